"""Position of a loader in the order of rows."""

from typing import NamedTuple


class OverlongCount(NamedTuple):
    """Rows longer than a place, and their tokens that are in no batch."""

    rows: int = 0
    tokens: int = 0


class Position(NamedTuple):
    """State that a loader resumes from.

    `next_row` is the global index of the next row to look at; `waiting` are those before it that
    have been looked at and are in no batch yet, in ascending order: the packer's window.
    """

    next_row: int = 0
    waiting: tuple[int, ...] = ()

    @property
    def rows_done(self) -> int:
        """Rows that were in batches so far, or dropped."""
        return self.next_row - len(self.waiting)
