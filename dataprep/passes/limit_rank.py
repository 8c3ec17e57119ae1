"""Choice of the rows of finished tasks that stay under limits: those with the lowest ranks."""

from bisect import bisect_right
from dataclasses import dataclass

from headrace.dataprep.rows.row_keys import Keys, permute_keys


def ranks(keys: Keys, seed: int) -> Keys:
    """The place of rows in the order in which limits take them.

    It is another order than that of the shards: there, what stays of one source must lie among
    all rows of the others.
    """
    return permute_keys(keys, seed, "limit")


@dataclass(frozen=True)
class RowCuts:
    """Limits on ranks: in tasks up to each of `ends`, rows of ranks from `tops` on are dropped."""

    seed: int
    ends: tuple[int, ...] = ()
    tops: tuple[int, ...] = ()

    def top(self, task: int) -> int | None:
        """The rank from which on rows of a task are left out; None: all stay."""
        place = bisect_right(self.ends, task)
        top = self.tops[place] if place < len(self.tops) else ALL
        return top if top < ALL else None


ALL = 1 << 64  # above every rank
