"""Choice of the rows of finished tasks that stay under limits: those with the lowest ranks."""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.keyed_hash import mix_numbers

Keys = npt.NDArray[np.uint64]


def permute_keys(keys: Keys, seed: int, *purpose: int | str) -> Keys:
    """New keys, a permutation of all 64-bit numbers: different rows never get equal ones.

    Two rounds of the keyed hash, each with a key derived from the seed.
    """
    for number in range(2):
        keys = mix_numbers(keys ^ np.uint64(derive_seed(seed, *purpose, number)))
    return keys


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
