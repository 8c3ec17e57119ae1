"""Pictures of rows as the loader decodes them: from encoded tiles to normalized values.

Values are those of transformers' own image processors (read against 5.23, their Pillow backend),
which round in the same order.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.schemas.errors import ConfigError, DataError, install_hint
from headrace.trainer.vision.tile import Tile

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 1 << 26  # of a tile; 8,192 x 8,192
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """A picture of a row: its tiles, each [3, height, width], and its own size."""

    tiles: list[Values]
    tokens: int  # that it fills
    width: int
    height: int


class Normalization:
    """Table of what the values of a channel, 0 to 255, become.

    Args:
        scale: factor of all values.
        mean, std: of each channel, after that.
    """

    def __init__(self, scale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
        shift, width = (np.array(values, np.float32)[:, None] for values in (mean, std))
        self.table = (scaled - shift) / width  # [3, 256]

    def apply(self, pixels: NDArray[np.uint8]) -> Values:
        """[height, width, 3] to [3, height, width]."""
        return np.stack([self.table[c].take(pixels[..., c]) for c in range(3)])


def pillow() -> Any:
    """Return Pillow's module of images.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ConfigError(f"[vision] needs Pillow; {install_hint('images')}") from None
    return Image


def decode(content: bytes, what: str) -> NDArray[np.uint8]:
    """Return the pixels of an encoded picture, [height, width, 3].

    Args:
        what: its name, for messages.

    Raises:
        DataError: no picture of the known formats, or one of absurd size.
    """
    image = pillow()
    try:
        with image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise DataError(f"{what}: {width} x {height} pixels; prepare the directory again")
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise DataError(
            f"{what}: cannot be decoded ({error}); prepare the directory again"
        ) from None


def pictures_of(tiles: Sequence[Tile], normalization: Normalization, what: str) -> list[Picture]:
    """Return the pictures of a row in order."""
    found: list[Picture] = []
    for number, tile in enumerate(tiles):
        pixels = decode(tile.bytes, f"{what}, picture {tile.picture}, tile {number}")
        values = normalization.apply(pixels)
        if tile.picture == len(found):
            found.append(Picture([values], tile.tokens, tile.width, tile.height))
        else:
            found[-1].tiles.append(values)
    return found
