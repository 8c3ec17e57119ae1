"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any size whose sides are whole merged patches."""

import math

from PIL import Image

from headrace.dataprep.images.picture import PictureError, Prepared
from headrace.dataprep.images.resizing import Size, resize
from headrace.schemas.vision.processor_record import Processor

MOST_RATIO = 200  # of the longer side to the shorter


class QwenFamily:
    """Pictures keep their aspect ratio, between two numbers of pixels."""

    def __init__(self, processor: Processor) -> None:
        numbers = {k: v for k, v in processor.settings.items() if isinstance(v, int)}
        self.patch, self.merge = numbers["patch_size"], numbers["merge_size"]
        self.least, self.most = numbers["min_pixels"], numbers["max_pixels"]
        self.resample = numbers["resample"]
        self.token = processor.tokens["placeholder"]

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the picture as one tile."""
        size = smart_size(image.size, self.patch * self.merge, self.least, self.most)
        tokens = size[0] * size[1] // (self.patch * self.merge) ** 2
        return Prepared([resize(image, size, self.resample)], self.token * tokens, tokens)


def smart_size(size: Size, unit: int, least: int, most: int) -> Size:
    """Return the nearest size with sides of whole units, of `least` to `most` pixels.

    Raises:
        PictureError: one side is more than 200 times the other.
    """
    width, height = size
    if max(size) / min(size) > MOST_RATIO:
        raise PictureError(
            "picture of an absurd shape", f"{width} x {height}: more than {MOST_RATIO} to 1"
        )
    near = [round(side / unit) * unit for side in size]
    if near[0] * near[1] > most:
        shrink = math.sqrt((height * width) / most)
        near = [max(unit, math.floor(side / shrink / unit) * unit) for side in size]
    elif near[0] * near[1] < least:
        grow = math.sqrt(least / (height * width))
        near = [math.ceil(side * grow / unit) * unit for side in size]
    return near[0], near[1]
