"""Idefics 3 and SmolVLM: a grid of square tiles after the picture has been made large, and the
whole as one."""

import math

from PIL import Image

from headrace.dataprep.images.picture import Prepared
from headrace.dataprep.images.resizing import Size, cut, resize
from headrace.schemas.vision.processor_record import Processor

MOST_SIDE = 4096


class Idefics3Family:
    """Each tile fills the same number of tokens, and tells its row and column."""

    def __init__(self, processor: Processor) -> None:
        numbers = {k: v for k, v in processor.settings.items() if isinstance(v, int)}
        self.longest, self.side = numbers["longest_edge"], numbers["max_image_size"]
        self.resample, self.tile_tokens = numbers["resample"], numbers["image_seq_len"]
        self.splits = bool(processor.settings["do_image_splitting"])
        self.names = processor.tokens
        self.inner = self.names["placeholder"] * self.tile_tokens

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the tiles row by row, and last the whole in the size of one."""
        image = resize(image, long_size(image.size, self.longest), self.resample)
        square = self.side, self.side
        if not self.splits:
            return self.described([resize(image, square, self.resample)], 0, 0)
        image = resize(image, whole_tiles(image.size, self.side), self.resample)
        columns, rows = (side // self.side for side in image.size)
        if columns * rows == 1:
            return self.described([image], 0, 0)
        tiles = [*cut(image, square), resize(image, square, self.resample)]
        return self.described(tiles, rows, columns)

    def described(self, tiles: list[Image.Image], rows: int, columns: int) -> Prepared:
        """Return tiles with the text that stands for them."""
        fake = self.names["fake"]
        lines = [
            "".join(f"{fake}<row_{r + 1}_col_{c + 1}>{self.inner}" for c in range(columns)) + "\n"
            for r in range(rows)
        ]
        gap = "\n" if rows else ""
        text = f"{''.join(lines)}{gap}{fake}{self.names['global']}{self.inner}{fake}"
        return Prepared(tiles, text, self.tile_tokens * len(tiles))


def long_size(size: Size, longest: int) -> Size:
    """Return the size with a given longer side; the shorter one is even."""
    width, height = size
    ratio = width / height
    if width >= height:
        even = int(longest / ratio)
        width, height = longest, even + even % 2
    else:
        even = int(longest * ratio)
        width, height = even + even % 2, longest
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MOST_SIDE:
        width, height = MOST_SIDE, int(MOST_SIDE / ratio)
    elif height > width and height > MOST_SIDE:
        width, height = int(MOST_SIDE * ratio), MOST_SIDE
    return max(width, 1), max(height, 1)


def whole_tiles(size: Size, side: int) -> Size:
    """Return the size of whole tiles, the longer side chosen first."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return width, height
