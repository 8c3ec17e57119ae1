"""Sort keys of rows: the order of a shard directory is that of these numbers."""

import numpy as np
import numpy.typing as npt

from headrace.schemas.fingerprint import derive_seed, derive_seed_array
from headrace.schemas.keyed_hash import mix_numbers

Keys = npt.NDArray[np.uint64]


def row_keys(seed: int, source: str, split: str, task: int, block: int, rows: int) -> Keys:
    """The 64-bit order keys of a block's rows: uniform, so that sorting by them shuffles."""
    return derive_seed_array(seed, "row", source, split, task, block, count=rows)


def permute_keys(keys: Keys, seed: int, *purpose: int | str) -> Keys:
    """New keys, a permutation of all 64-bit numbers: different rows never get equal ones.

    Two rounds of the keyed hash, each with a key derived from the seed.
    """
    for number in range(2):
        keys = mix_numbers(keys ^ np.uint64(derive_seed(seed, *purpose, number)))
    return keys
