"""Positions in three axes, and the groups of tokens that see each other, of packed documents."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int32]


def three_axes(
    is_picture: NDArray[np.bool_], lengths: Sequence[int], grids: Iterator[tuple[int, int]]
) -> Positions:
    """Return [3, s] positions in time, height and width, which restart at every document.

    Args:
        is_picture: [s] whether a token is one of a picture's.
        lengths: of the documents, which sum to s.
        grids: tokens down and across of each picture, in order.
    """
    parts, start = [], 0
    for length in lengths:
        parts.append(of_document(is_picture[start : start + length], grids))
        start += length
    return np.concatenate(parts, axis=1)


def of_document(is_picture: NDArray[np.bool_], grids: Iterator[tuple[int, int]]) -> Positions:
    """[3, n] positions of one document. Text after a picture goes on behind its longer side."""
    size = len(is_picture)
    positions = np.empty((3, size), np.int32)
    places = np.flatnonzero(is_picture)
    at = position = used = 0
    while True:
        start = int(places[used]) if used < len(places) else size
        positions[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        if start == size:
            return positions
        rows, columns = next(grids)
        at = start + rows * columns
        positions[:, start:at] = position + in_picture(rows, columns)
        position += max(rows, columns)
        used += rows * columns


def in_picture(rows: int, columns: int) -> Positions:
    """[3, rows * columns] positions inside a picture."""
    down, across = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    return np.stack([np.zeros_like(down), down, across])


def picture_groups(is_picture: NDArray[np.bool_], lengths: Sequence[int]) -> NDArray[np.int32]:
    """[s] the number of the run of picture tokens that a token is in, -1 outside of any.

    A run ends with its document.
    """
    begins = is_picture.copy()
    begins[1:] &= ~is_picture[:-1]
    firsts = np.cumsum([0, *lengths[:-1]])
    begins[firsts] |= is_picture[firsts]
    return np.where(is_picture, np.cumsum(begins) - 1, -1).astype(np.int32)
