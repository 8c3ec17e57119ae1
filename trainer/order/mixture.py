"""The exact mixture of several datasets: whose row comes when, by their shares."""

from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

LARGEST_PERIOD = 1 << 16  # rows; the smallest share is one row of it


EXACT = 1e-9  # relative error below which a share counts as met


def whole_parts(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers of at most LARGEST_PERIOD in all, in proportion to `shares`, which sum to 1.

    The fewest that meet every share to EXACT, else those with the smallest relative error of any
    share. Each sum is given out by largest remainder.
    """
    share = np.array([float(share) for share in shares])
    totals = np.arange(1, LARGEST_PERIOD + 1)
    wished = totals[:, None] * share
    parts = np.floor(wished).astype(np.int64)
    by_remainder = np.argsort(np.argsort(parts - wished, axis=1, kind="stable"), axis=1)
    parts += by_remainder < (totals - parts.sum(axis=1))[:, None]
    errors = np.abs(parts / wished - 1).max(axis=1)
    errors[parts.min(axis=1) == 0] = np.inf
    exact = np.flatnonzero(errors <= EXACT)
    best = parts[exact[0] if len(exact) else np.argmin(errors)]
    return [int(part) for part in best]


def chairman_pattern(parts: Sequence[int]) -> NDArray[np.int64]:
    """Return the dataset of each row of one period of sum(parts) rows.

    Of D datasets each has, after any number of rows, given its share to within
    1 - 1 / (2 (D - 1)) rows (1/2 of two datasets). Tijdeman, "The chairman assignment problem",
    1980, shows that this can be done and is the best there is. The bound gives each row of each
    dataset an earliest and a latest place; taking the earliest deadline first meets them all.
    """
    period = sum(parts)
    m = max(2 * (len(parts) - 1), 1)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for dataset, part in enumerate(parts):
        rows = m * np.arange(part)
        earliest = -(-(rows + 1) * period // (m * part)) - 1
        latest = (rows + m - 1) * period // (m * part)
        for place, deadline in zip(earliest.tolist(), latest.tolist(), strict=True):
            released[place].append((deadline, dataset))
    waiting: list[tuple[int, int]] = []
    pattern = np.empty(period, dtype=np.int64)
    for place, rows_of_place in enumerate(released):
        for row in rows_of_place:
            heappush(waiting, row)
        pattern[place] = heappop(waiting)[1]
    return pattern


class Schedule:
    """Map from a global index to the dataset that gives the row, and its number in that dataset.

    Args:
        parts: rows of each dataset in one period of the pattern, which repeats.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        self.parts = list(parts)
        self.period = sum(parts)
        self._pattern = chairman_pattern(parts)
        self._places = [np.flatnonzero(self._pattern == dataset) for dataset in range(len(parts))]
        self._rows = np.empty(self.period, dtype=np.int64)
        for places in self._places:
            self._rows[places] = np.arange(len(places))

    def locate(self, index: int) -> tuple[int, int]:
        """Dataset and row of it, counted over all periods, at a global index."""
        period, place = divmod(index, self.period)
        dataset = int(self._pattern[place])
        return dataset, period * self.parts[dataset] + int(self._rows[place])

    def rows_before(self, index: int) -> list[int]:
        """Rows that each dataset has given before a global index."""
        periods, place = divmod(index, self.period)
        return [
            periods * part + int(np.searchsorted(places, place))
            for part, places in zip(self.parts, self._places, strict=True)
        ]

    def index_of(self, dataset: int, row: int) -> int:
        """The global index of a dataset's row: `locate` the other way round."""
        period, number = divmod(row, self.parts[dataset])
        return period * self.period + int(self._places[dataset][number])
