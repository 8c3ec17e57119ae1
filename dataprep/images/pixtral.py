"""Pixtral and Mistral 3: any size of whole patches, with a token at the end of each row of them."""

import math

from PIL import Image

from headrace.dataprep.images.picture import Prepared
from headrace.dataprep.images.resizing import Size, resize
from headrace.schemas.vision.processor_record import Processor


class PixtralFamily:
    """Pictures keep their aspect ratio, and become no larger than a square."""

    def __init__(self, processor: Processor) -> None:
        numbers = {k: v for k, v in processor.settings.items() if isinstance(v, int)}
        self.longest, self.resample = numbers["longest_edge"], numbers["resample"]
        self.unit = numbers["patch_size"] * numbers["spatial_merge_size"]
        self.tokens = processor.tokens

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the picture as one tile."""
        columns, rows = self.patches(image.size)
        tile = resize(image, (columns * self.unit, rows * self.unit), self.resample)
        row = self.tokens["placeholder"] * columns
        text = self.tokens["break"].join([row] * rows) + self.tokens["end"]
        return Prepared([tile], text, columns * rows)

    def patches(self, size: Size) -> tuple[int, int]:
        """Return the patches along width and height, the last ones filled up."""
        ratio = max(side / self.longest for side in size)
        sides = [max(1, math.floor(side / ratio)) for side in size] if ratio > 1 else size
        columns, rows = (-(-side // self.unit) for side in sides)
        return columns, rows
