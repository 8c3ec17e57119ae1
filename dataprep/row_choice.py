"""Choice of the rows of finished tasks that stay under limits: those with the lowest ranks."""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.schemas.fingerprint import derive_seed

Keys = npt.NDArray[np.uint64]


def permute_keys(keys: Keys, seed: int, *purpose: int | str) -> Keys:
    """New keys, a permutation of all 64-bit numbers: different rows never get equal ones.

    Two rounds of the finalizer of SplitMix64 (Steele, Lea and Flood, 2014) in the variant
    "Mix13", each after an exclusive or with a number derived from the seed.
    """
    mixed = keys.astype(np.uint64)  # a copy
    for number in range(2):
        mixed ^= np.uint64(derive_seed(seed, *purpose, number))
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


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
