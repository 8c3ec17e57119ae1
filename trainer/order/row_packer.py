"""Rows into places of fixed length: as few empty tokens as a short look ahead allows."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from headrace.schemas.errors import DataError
from headrace.schemas.train.data_config import Overlong
from headrace.trainer.order.position import OverlongCount, Position

T = TypeVar("T")

MOST_DROPPED = 1 << 20  # rows, one after the other, before the search for a short one ends


class Candidate(NamedTuple, Generic[T]):
    """Candidate of a row for a sequence: its tokens, and the item to put there for it."""

    tokens: int
    item: T


class UnpackedRows(Generic[T]):
    """One row in each place.

    Args:
        look: at the row of a global index.
        stop_row: global row index at which the data ends.
    """

    def __init__(self, look: Callable[[int], T], stop_row: int, position: Position) -> None:
        assert not position.waiting
        self.look = look
        self.stop_row = stop_row
        self.position = position

    def take(self, places: int) -> list[list[T]]:
        """The next places; fewer where the data ends."""
        first = self.position.next_row
        stop = min(first + places, self.stop_row)
        self.position = Position(stop)
        return [[self.look(index)] for index in range(first, stop)]

    def take_overlong(self) -> OverlongCount:
        """Return zero: rows that are not packed are never dropped."""
        return OverlongCount()


class RowPacker(Generic[T]):
    """Several rows in each place: the one that waits longest, then the longest that still fit.

    A function of the position alone: of the next `look_ahead` rows those that wait are known by
    their indices. No row waits for more than `look_ahead` places.

    Args:
        look: at the row of a global index.
        tokens: capacity of a place.
        look_ahead: rows that wait at once.
        overlong: what becomes of a row with more tokens than a place: refused, cut, or left out.
        epoch_end: of the row of a global index; no place holds rows of two epochs. None: it has no
            border.
        stop_row: global row index at which the data ends; None: never.
    """

    def __init__(
        self,
        look: Callable[[int], Candidate[T]],
        *,
        tokens: int,
        look_ahead: int,
        overlong: Overlong,
        epoch_end: Callable[[int], int | None],
        stop_row: int | None,
        position: Position,
    ) -> None:
        self.look = look
        self.tokens = tokens
        self.look_ahead = look_ahead
        self.policy = overlong
        self.epoch_end = epoch_end
        self.stop_row = stop_row
        self._overlong = OverlongCount()
        self._next_row = position.next_row
        self._waiting: dict[int, Candidate[T]] = {}  # by index, oldest first
        self._by_length: list[tuple[int, int]] = []  # (tokens, -index): of equals the oldest last
        for index in position.waiting:
            self._let_wait(index, self.look(index))

    @property
    def position(self) -> Position:
        return Position(self._next_row, tuple(self._waiting))

    def take(self, places: int) -> list[list[T]]:
        """The next places; fewer where the data ends."""
        taken: list[list[T]] = []
        while len(taken) < places and (place := self._next_place()):
            taken.append(place)
        return taken

    def take_overlong(self) -> OverlongCount:
        """Return the count of overlong rows met since the last call."""
        counted, self._overlong = self._overlong, OverlongCount()
        return counted

    def _next_place(self) -> list[T]:
        self._look_ahead()
        dropped = self._overlong.rows
        while not self._waiting and self._next_row != self.stop_row:
            if self._overlong.rows - dropped > MOST_DROPPED:
                raise DataError(
                    f"more than {MOST_DROPPED:,} rows in a row have more than the {self.tokens} "
                    "tokens of loader.tokens_per_row; raise it"
                )
            self._look_ahead()
        place: list[T] = []
        capacity = self.tokens
        chosen = next(iter(self._waiting), None)
        while chosen is not None:
            candidate = self._waiting.pop(chosen)
            tokens = min(candidate.tokens, self.tokens)
            del self._by_length[bisect_left(self._by_length, (tokens, -chosen))]
            place.append(candidate.item)
            capacity -= tokens
            fitting = bisect_right(self._by_length, (capacity, 0))
            chosen = -self._by_length[fitting - 1][1] if fitting else None
        return place

    def _look_ahead(self) -> None:
        stop = self._stop()
        while len(self._waiting) < self.look_ahead and (stop is None or self._next_row < stop):
            index = self._next_row
            candidate = self.look(index)
            self._next_row += 1
            if candidate.tokens > self.tokens:
                self._count(index, candidate.tokens)
                if self.policy == "drop":
                    continue
            self._let_wait(index, candidate)

    def _stop(self) -> int | None:
        """The index up to which rows may join those that wait."""
        end = self.epoch_end(next(iter(self._waiting), self._next_row))
        if end is None or self.stop_row is None:
            return self.stop_row if end is None else end
        return min(end, self.stop_row)

    def _let_wait(self, index: int, candidate: Candidate[T]) -> None:
        self._waiting[index] = candidate
        insort(self._by_length, (min(candidate.tokens, self.tokens), -index))

    def _count(self, index: int, tokens: int) -> None:
        if self.policy == "error":
            raise DataError(
                f"row {index} of the order has {tokens} tokens, more than the {self.tokens} of "
                'loader.tokens_per_row; raise it, or set loader.overlong to "truncate" or "drop"'
            )
        lost = tokens if self.policy == "drop" else tokens - self.tokens
        self._overlong = OverlongCount(self._overlong.rows + 1, self._overlong.tokens + lost)


Sequences: TypeAlias = UnpackedRows[T] | RowPacker[T]
