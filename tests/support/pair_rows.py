"""The pairs of the cases, as rows of shards."""

import numpy as np
from pair_cases import make_pairs

from headrace.trainer.shards.decoded_pairs import Pair
from headrace.trainer.shards.decoded_rows import Row


def as_pair(prompt, chosen, rejected, key):
    def side(answer):
        ids = np.array(prompt + answer, np.int32)
        mask = np.arange(len(ids)) >= len(prompt)
        return Row(ids, mask, np.array([len(ids)], np.int32), "pairs", key)

    return Pair(side(chosen), side(rejected))


PAIRS = [as_pair(*pair, key) for key, pair in enumerate(make_pairs())]
