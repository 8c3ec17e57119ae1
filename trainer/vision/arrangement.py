"""Arguments of a tower, made of decoded pictures: patches, tiles, or padded pictures.

Imports no torch. Names are those of transformers' `get_image_features`, read against 5.23.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.trainer.vision.pictures import Picture, Values

Arguments = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Numbers:
    """Sizes that a processor cuts patches by: their side, how many become one token along a side,
    and how often a picture is repeated in time.
    """

    patch: int
    merge: int = 1
    frames: int = 1


def patches(pictures: Sequence[Picture], numbers: Numbers) -> Arguments:
    """Return pictures in patches, those that become one token together."""
    tiles = [tile for picture in pictures for tile in picture.tiles]
    grids = [grid_of(tile, numbers) for tile in tiles]
    counts = [rows * columns for rows, columns in grids]
    values = np.empty((sum(counts), 3 * numbers.frames * numbers.patch**2), np.float32)
    for tile, part in zip(tiles, np.split(values, np.cumsum(counts)[:-1]), strict=True):
        cut_into_patches(tile, numbers, part)
    return {"pixel_values": values, "image_grid_thw": np.array([[1, *grid] for grid in grids])}


def grid_of(tile: Values, numbers: Numbers) -> tuple[int, int]:
    """Return the patches of a tile down and across."""
    _, height, width = tile.shape
    return height // numbers.patch, width // numbers.patch


def cut_into_patches(tile: Values, numbers: Numbers, into: Values) -> None:
    """[3, height, width] into [patches, 3 * frames * patch * patch]."""
    rows, columns = grid_of(tile, numbers)
    size, merge = numbers.patch, numbers.merge
    blocks = tile.reshape(3, rows // merge, merge, size, columns // merge, merge, size)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    into.reshape(*blocks.shape[:5], numbers.frames, size, size)[...] = blocks


def tiles(pictures: Sequence[Picture], numbers: Numbers) -> Arguments:
    """Return tiles, all of one size."""
    values = [tile for picture in pictures for tile in picture.tiles]
    return {"pixel_values": np.stack(values)}


def tiles_of_one_row(pictures: Sequence[Picture], numbers: Numbers) -> Arguments:
    """Return tiles as those of a single text."""
    return {"pixel_values": tiles(pictures, numbers)["pixel_values"][None]}


def tiles_with_sizes(pictures: Sequence[Picture], numbers: Numbers) -> Arguments:
    """Return tiles, and the sizes of whole pictures, by which padding is left out."""
    sizes = np.array([[picture.height, picture.width] for picture in pictures])
    return tiles(pictures, numbers) | {"image_sizes": sizes}


def padded(pictures: Sequence[Picture], numbers: Numbers) -> Arguments:
    """Return pictures of many sizes, padded to the largest, and the sizes."""
    values = [tile for picture in pictures for tile in picture.tiles]
    height, width = (max(tile.shape[axis] for tile in values) for axis in (1, 2))
    whole = np.zeros((len(values), 3, height, width), np.float32)
    for place, tile in zip(whole, values, strict=True):
        place[:, : tile.shape[1], : tile.shape[2]] = tile
    sizes = np.array([tile.shape[1:] for tile in values])
    return {"pixel_values": whole, "image_sizes": sizes}


ARRANGEMENTS: Mapping[str, Callable[[Sequence[Picture], Numbers], Arguments]] = {
    "patches": patches,
    "tiles": tiles,
    "tiles of one row": tiles_of_one_row,
    "tiles with sizes": tiles_with_sizes,
    "padded": padded,
}
ANY_SIZE = ("patches", "padded")  # those of pictures of any size, not in tiles of one
