"""Order of rows: a pure function of (row groups, seed, global row index)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.shards.row_groups import RowAddress, RowGroup, RowGroups, keyed_permutation


class Pieces(NamedTuple):
    """Rows of an epoch: of row group `group[i]`, `rows[i]` rows from its row `first[i]` on."""

    group: NDArray[np.int64]
    first: NDArray[np.int64]
    rows: NDArray[np.int64]

    def pick(self, chosen: NDArray[np.int64] | slice) -> "Pieces":
        return Pieces(self.group[chosen], self.first[chosen], self.rows[chosen])


class Window(NamedTuple):
    """Consecutive rows of the order, from global index `first` up to `stop`."""

    first: int
    stop: int
    row_groups: list[RowGroup]
    which: NDArray[np.int64]  # of `row_groups`, for each row
    row: NDArray[np.int64]  # and its place in there


def take_rows(sizes: NDArray[np.int64], first: int, rows: int) -> Pieces:
    """`rows` rows from row `first` on of row groups that repeat endlessly in their order."""
    first %= int(sizes.sum())
    passes = -(-(first + rows) // int(sizes.sum()))
    ends = np.cumsum(np.tile(sizes, passes))
    starts = ends - np.tile(sizes, passes)
    low, high = np.clip(first, starts, ends), np.clip(first + rows, starts, ends)
    used = np.flatnonzero(high > low)
    return Pieces(used % len(sizes), (low - starts)[used], (high - low)[used])


class RowOrder:
    """An endless sequence of rows: epoch after epoch, each another permutation of its rows.

    Row groups are permuted by epoch, and rows inside windows of consecutive row groups, so a reader
    holds one window at a time and can start anywhere.

    Args:
        row_groups: all row groups of all datasets, in file order.
        window: row groups that are mixed and held at once.
        shuffle: without it, rows come in file order, every epoch the same.
        dataset_rows: rows that each dataset gives in an epoch, taken up in file order where the
            epoch before left off. Default: each row once.
    """

    def __init__(
        self,
        row_groups: RowGroups,
        seed: int,
        window: int,
        shuffle: bool = True,
        dataset_rows: Sequence[int] | None = None,
    ) -> None:
        self.row_groups = row_groups.pick(row_groups.rows > 0)
        self.seed = seed
        self.window = window
        self.shuffle = shuffle
        self.dataset_rows = dataset_rows
        self._sizes = self.row_groups.rows.astype(np.int64)
        self.rows_per_epoch = sum(dataset_rows) if dataset_rows else int(self._sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self._window = lru_cache(maxsize=2)(self._plan_window)
        self._recent = Window(0, 0, [], np.empty(0, np.int64), np.empty(0, np.int64))

    def __getitem__(self, index: int) -> RowAddress:
        """The row at a global index, counted over all epochs."""
        window = self._recent
        if not window.first <= index < window.stop:
            epoch, offset = divmod(index, self.rows_per_epoch)
            _, starts = self._epoch(epoch)
            number = int(np.searchsorted(starts, offset, side="right")) - 1
            window = self._recent = self._window(epoch, number)
        place = index - window.first
        return RowAddress(window.row_groups[window.which[place]], int(window.row[place]))

    def rows(self, first: int, stop: int) -> Iterator[RowAddress]:
        """The rows of a range of global indices, in order."""
        return (self[index] for index in range(first, stop))

    def _plan_epoch(self, epoch: int) -> tuple[Pieces, NDArray[np.int64]]:
        """Return the rows that an epoch takes of each row group, and the offset of each window."""
        pieces = self._file_order(epoch)
        if self.shuffle:
            seed = derive_seed(self.seed, "row groups", epoch)
            pieces = pieces.pick(keyed_permutation(len(pieces.rows), seed))
        starts = (np.cumsum(pieces.rows) - pieces.rows)[:: self.window]
        return pieces, starts

    def _file_order(self, epoch: int) -> Pieces:
        """Return the rows that an epoch takes of each row group, before the shuffle."""
        if self.dataset_rows is None:
            return Pieces(np.arange(len(self._sizes)), np.zeros_like(self._sizes), self._sizes)
        datasets = self.row_groups.dataset
        parts = []
        for dataset, rows in enumerate(self.dataset_rows):
            own = np.flatnonzero(datasets == dataset)
            if rows:
                part = take_rows(self._sizes[own], epoch * rows, rows)
                parts.append(part._replace(group=own[part.group]))
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _plan_window(self, epoch: int, number: int) -> Window:
        """The rows of one window in their order."""
        pieces, starts = self._epoch(epoch)
        pieces = pieces.pick(slice(number * self.window, (number + 1) * self.window))
        size = int(pieces.rows.sum())
        permutation = np.arange(size)
        if self.shuffle:
            permutation = keyed_permutation(size, derive_seed(self.seed, "rows", epoch, number))
        which = np.repeat(np.arange(len(pieces.rows)), pieces.rows)[permutation]
        first_rows = np.cumsum(pieces.rows) - pieces.rows
        row = permutation + (pieces.first - first_rows)[which]
        first = epoch * self.rows_per_epoch + int(starts[number])
        row_groups = [self.row_groups[group] for group in pieces.group.tolist()]
        return Window(first, first + size, row_groups, which, row)
