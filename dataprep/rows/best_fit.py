"""Best-fit decreasing: whole documents to rows, so that few tokens of the rows stay empty."""

import numpy as np
import numpy.typing as npt

WORD_BITS = 1024  # two levels of words this long hold the largest `sequence_len`, 2^20


class RoomSet:
    """A set of amounts of room; the least that is large enough is found in constant time.

    A tree of two levels with a branching of 1024: bits of Python integers, and above them one
    integer with a bit for each that is not 0.
    """

    def __init__(self, largest: int) -> None:
        self.words = [0] * (largest // WORD_BITS + 1)
        self.used = 0

    def add(self, room: int) -> None:
        """Put an amount in; it may be there already."""
        index, bit = divmod(room, WORD_BITS)
        self.words[index] |= 1 << bit
        self.used |= 1 << index

    def remove(self, room: int) -> None:
        """Take an amount out that is there."""
        index, bit = divmod(room, WORD_BITS)
        self.words[index] ^= 1 << bit
        if not self.words[index]:
            self.used ^= 1 << index

    def least_from(self, room: int) -> int | None:
        """The least amount that is at least `room`, or None."""
        index, bit = divmod(room, WORD_BITS)
        if self.words[index] >> bit:
            return room + lowest_bit(self.words[index] >> bit)
        if not self.used >> index + 1:
            return None
        index += 1 + lowest_bit(self.used >> index + 1)
        return index * WORD_BITS + lowest_bit(self.words[index])


def lowest_bit(number: int) -> int:
    """The place of the lowest bit of a positive number."""
    return (number & -number).bit_length() - 1


def best_fit_rows(lengths: npt.NDArray[np.int64], sequence_len: int) -> npt.NDArray[np.int64]:
    """The row of each document, rows numbered as they are opened: O(n log n), for the sort.

    Documents are placed from the longest to the shortest, equal ones in their order, each in the
    row with the least room that is enough; of several such rows the one that was filled last. A
    row is opened only when no other has the room, so no two rows would fit into one.

    Args:
        lengths: tokens of each document, from 1 to `sequence_len`.
    """
    order = np.argsort(-lengths, kind="stable")
    rows_by_room: dict[int, list[int]] = {}  # the row that was filled last comes last
    rooms = RoomSet(sequence_len)
    placed: list[int] = []  # the row of each document, in `order`
    opened = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            room = rooms.least_from(length)
            if room is None:
                row, room, opened = opened, sequence_len, opened + 1
            else:
                row = rows_by_room[room].pop()
                if not rows_by_room[room]:
                    rooms.remove(room)
            fitting = min(left, room // length)  # the fullest row stays the best for its equals
            placed += [row] * fitting
            left -= fitting
            room -= fitting * length
            if room:
                rows_by_room.setdefault(room, []).append(row)
                rooms.add(room)
    rows = np.empty(len(lengths), np.int64)
    rows[order] = placed
    return rows
