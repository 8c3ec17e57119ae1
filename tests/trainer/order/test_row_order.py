"""The order of rows is a pure function of row groups, seed and index."""

import hashlib

import numpy as np
import pytest

from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import RowGroup, RowGroups, keyed_permutation


def groups(sizes):
    return RowGroups.of(
        RowGroup(0, index // 3, index % 3, rows) for index, rows in enumerate(sizes)
    )


SIZES = [7, 1, 12, 0, 5, 9, 3, 11]


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_every_row_comes_exactly_once_in_each_epoch(window):
    order = RowOrder(groups(SIZES), seed=3, window=window)
    expected = {(group, row) for group in groups(SIZES) for row in range(group.rows)}
    epochs = []
    for epoch in range(3):
        first = epoch * order.rows_per_epoch
        addresses = list(order.rows(first, first + order.rows_per_epoch))
        assert {(address.row_group, address.row) for address in addresses} == expected
        assert len(addresses) == len(expected)
        epochs.append(addresses)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_access_at_random_equals_access_in_sequence():
    order = RowOrder(groups(SIZES), seed=3, window=2)
    total = 3 * order.rows_per_epoch
    in_sequence = list(order.rows(0, total))
    fresh = RowOrder(groups(SIZES), seed=3, window=2)
    for index in np.random.default_rng(0).permutation(total):
        assert fresh[int(index)] == in_sequence[index]


def test_a_reader_needs_no_more_row_groups_at_once_than_the_window():
    order = RowOrder(groups([4] * 12), seed=1, window=3)
    for first in range(0, 48, 12):
        assert len({address.row_group for address in order.rows(first, first + 12)}) == 3


def test_without_shuffle_rows_come_in_file_order_every_epoch():
    order = RowOrder(groups(SIZES), seed=3, window=2, shuffle=False)
    rows = [(group, row) for group in groups(SIZES) for row in range(group.rows)]
    taken = [(a.row_group, a.row) for a in order.rows(0, 2 * order.rows_per_epoch)]
    assert taken == rows + rows


def test_another_seed_gives_another_order():
    one, other = (list(RowOrder(groups(SIZES), seed, window=4).rows(0, 48)) for seed in (0, 1))
    assert one != other


def test_the_order_never_changes_between_releases():
    """Runs that were started with an older release must go on with the same rows."""
    order = RowOrder(groups(SIZES), seed=42, window=2)
    text = ",".join(f"{a.row_group.shard}/{a.row_group.group}/{a.row}" for a in order.rows(0, 96))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert keyed_permutation(8, 42).tolist() == GOLDEN_PERMUTATION
    assert digest == GOLDEN_DIGEST


GOLDEN_PERMUTATION = [4, 6, 3, 2, 7, 0, 5, 1]
GOLDEN_DIGEST = "ebda89fa20c186d77584dc1cb7505a375ca4df76cf77f4dadc375f85072178d7"


def test_permutations_of_small_sets_are_uniform():
    """Chi-square over the 24 orders of four items: 23 degrees of freedom, 99.9% below 49.7."""
    counts = {}
    for seed in range(4800):
        key = tuple(keyed_permutation(4, seed * 0x9E3779B9).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7
