"""LLaVA: one square of a fixed size; LLaVA-NeXT: that and the tiles of a larger canvas."""

import math
from collections.abc import Sequence

from PIL import Image

from headrace.dataprep.images.picture import Prepared
from headrace.dataprep.images.resizing import (
    Size,
    center_crop,
    cut,
    padded,
    resize,
    target_size,
)
from headrace.schemas.vision.processor_record import Processor


class LlavaFamily:
    """The picture, resized and cropped (or padded) to a square."""

    def __init__(self, processor: Processor) -> None:
        settings = processor.settings
        self.edges = edges_of(settings["size"])
        crop = edges_of(settings["crop_size"])
        self.crop: Size = (crop["width"], crop["height"])
        self.crops = bool(settings["do_center_crop"])
        self.pads = bool(settings.get("do_pad"))
        numbers = {k: v for k, v in settings.items() if isinstance(v, int)}
        self.patch, self.resample = numbers["patch_size"], numbers["resample"]
        extra = numbers["num_additional_image_tokens"]
        self.extra = extra - (settings["vision_feature_select_strategy"] == "default")
        mean = settings["image_mean"]
        assert isinstance(mean, list)
        red, green, blue = (int(float(str(part)) * 255) for part in mean)
        self.color = (red, green, blue)
        self.token = processor.tokens["placeholder"]

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the picture as one tile."""
        if self.pads:
            image = padded(image, (max(image.size), max(image.size)), self.color)
        tile = self.finish(image)
        columns, rows = (side // self.patch for side in tile.size)
        tokens = columns * rows + self.extra
        return Prepared([tile], self.token * tokens, tokens)

    def finish(self, image: Image.Image) -> Image.Image:
        """Return an image resized and cropped."""
        resized = resize(image, target_size(image.size, self.edges), self.resample)
        return center_crop(resized, self.crop) if self.crops else resized


class LlavaNextFamily(LlavaFamily):
    """The picture as a square, and the tiles of the canvas that fits it best."""

    def __init__(self, processor: Processor) -> None:
        super().__init__(processor)
        points = processor.settings["image_grid_pinpoints"]
        assert isinstance(points, list)
        pairs = [point for point in points if isinstance(point, list)]
        self.canvases: list[Size] = [(int(str(w)), int(str(h))) for h, w in pairs]
        short = self.edges.get("shortest_edge", 0)
        self.square: Size = (self.edges.get("width", short), self.edges.get("height", short))

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the whole picture, and after it the tiles of its canvas row by row."""
        canvas = best_canvas(image.size, self.canvases)
        inner = resize(image, fit(image.size, canvas), self.resample)
        side = self.crop[1]
        parts = [resize(image, self.square, self.resample)]
        parts += cut(padded(inner, canvas), (side, side))
        tokens = self.count(image.size, canvas) + self.extra
        return Prepared([self.finish(part) for part in parts], self.token * tokens, tokens)

    def count(self, size: Size, canvas: Size) -> int:
        """Return the features of the whole, and of the canvas less its padding, with one for the
        end of each row.
        """
        width, height = size
        columns, rows = (side // self.patch for side in self.crop)
        across = columns * (canvas[0] // self.crop[0])
        down = rows * (canvas[1] // self.crop[1])
        if width / height > across / down:
            kept = int(round(height * (across / width), 7))
            down -= (down - kept) // 2 * 2
        else:
            kept = int(round(width * (down / height), 7))
            across -= (across - kept) // 2 * 2
        return across * down + down + columns * rows


def edges_of(value: object) -> dict[str, int]:
    """Return a size of the settings."""
    assert isinstance(value, dict)
    return {str(name): int(side) for name, side in value.items()}


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """Return the canvas that shows most of a picture's pixels, of equal ones the one that wastes
    least.
    """
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fit(size: Size, canvas: Size) -> Size:
    """Return the size in which a picture just fits into a canvas."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]
