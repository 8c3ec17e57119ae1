"""One entry of the column of pictures: what a vision tower sees as one input. Imports nothing."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Encoded picture, or a part of one; fields are those of the column.

    `picture` is its number in the row; `tokens`, `width` and `height` are those of the whole
    picture, before it was resized.
    """

    bytes: bytes
    picture: int
    tokens: int
    width: int
    height: int
