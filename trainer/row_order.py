"""Which row comes when: a pure function of (row groups, seed, global row index)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from headrace.schemas.fingerprint import derive_seed

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: indices of its dataset, of its shard there, of itself in the file."""

    dataset: int
    shard: int
    group: int
    rows: int


@dataclass(frozen=True)
class RowAddress:
    """One row: its row group and its place in it."""

    row_group: RowGroup
    row: int


def keyed_permutation(size: int, seed: int) -> NDArray[np.int64]:
    """A permutation of range(size), the same for every numpy version.

    Sorts the indices by a 64-bit mix of index and seed (the finaliser of SplitMix64: Steele, Lea,
    Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(1, size + 1, dtype=np.uint64) * GOLDEN) ^ np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


class RowOrder:
    """An endless sequence of rows: epoch after epoch, each another permutation of all rows.

    Row groups are permuted by epoch, and rows inside windows of consecutive row groups, so a reader
    holds one window at a time and can start anywhere.

    Args:
        row_groups: all row groups of all datasets, in file order.
        window: row groups that are mixed and held at once.
        shuffle: without it, rows come in file order, every epoch the same.
    """

    def __init__(
        self, row_groups: Sequence[RowGroup], seed: int, window: int, shuffle: bool = True
    ) -> None:
        self.row_groups = [group for group in row_groups if group.rows]
        self.seed = seed
        self.window = window
        self.shuffle = shuffle
        self.rows_per_epoch = sum(group.rows for group in self.row_groups)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self._window = lru_cache(maxsize=2)(self._plan_window)

    def __getitem__(self, index: int) -> RowAddress:
        """The row at a global index, counted over all epochs."""
        epoch, offset = divmod(index, self.rows_per_epoch)
        _, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        groups, first_rows, permutation = self._window(epoch, number)
        place = int(permutation[offset - int(starts[number])])
        which = int(np.searchsorted(first_rows, place, side="right")) - 1
        return RowAddress(groups[which], place - int(first_rows[which]))

    def rows(self, first: int, stop: int) -> Iterator[RowAddress]:
        """The rows of a range of global indices, in order."""
        return (self[index] for index in range(first, stop))

    def _plan_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the row groups in an epoch, and the offset at which each window starts."""
        count = len(self.row_groups)
        order = np.arange(count)
        if self.shuffle:
            order = keyed_permutation(count, derive_seed(self.seed, "row groups", epoch))
        sizes = np.array([self.row_groups[index].rows for index in order], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[:: self.window]
        return order, starts

    def _plan_window(
        self, epoch: int, number: int
    ) -> tuple[list[RowGroup], NDArray[np.int64], NDArray[np.int64]]:
        """A window's row groups, where each begins in it, and the permutation of its rows."""
        order, _ = self._epoch(epoch)
        chosen = order[number * self.window : (number + 1) * self.window]
        groups = [self.row_groups[index] for index in chosen]
        ends = np.cumsum([group.rows for group in groups])
        first_rows = np.concatenate([[0], ends[:-1]])
        permutation = np.arange(ends[-1])
        if self.shuffle:
            seed = derive_seed(self.seed, "rows", epoch, number)
            permutation = keyed_permutation(int(ends[-1]), seed)
        return groups, first_rows, permutation
