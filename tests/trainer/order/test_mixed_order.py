"""Mixed datasets keep their proportion at every row, and any row is found without those before."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.trainer.order.mixed_order import MixedOrder
from headrace.trainer.order.mixture import LARGEST_PERIOD, Schedule, chairman_pattern, whole_parts
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import RowGroup, RowGroups


def largest_deviation(parts, rows):
    """Of any dataset after any number of rows, from its share of them."""
    schedule = Schedule(parts)
    given_rows = np.zeros(len(parts), dtype=np.int64)
    shares = np.array(parts) / sum(parts)
    worst = 0.0
    for index in range(rows):
        dataset, row = schedule.locate(index)
        assert row == given_rows[dataset], "a dataset's rows come one after the other"
        assert schedule.index_of(dataset, row) == index
        given_rows[dataset] += 1
        worst = max(worst, np.abs(given_rows - (index + 1) * shares).max())
    return worst


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_no_dataset_is_ever_a_whole_row_off_its_share(parts):
    bound = 1 - 1 / (2 * (len(parts) - 1))
    assert largest_deviation(parts, 2 * sum(parts) + 7) <= bound + 1e-9


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=6))
def test_any_weights_come_out_in_proportion(weights):
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    assume(min(shares) * LARGEST_PERIOD >= 1)
    parts = whole_parts(shares)
    assert sum(parts) <= LARGEST_PERIOD
    for part, share in zip(parts, shares, strict=True):
        assert abs(part / sum(parts) / share - 1) <= 1 / (LARGEST_PERIOD * min(shares))
    pattern = chairman_pattern(parts)
    wished = np.arange(1, len(pattern) + 1)
    for dataset, part in enumerate(parts):
        assert np.abs(np.cumsum(pattern == dataset) - wished * part / len(pattern)).max() < 1


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.3], [7, 3]),
        ([2.0, 2.0, 2.0], [1, 1, 1]),
        ([5.0], [1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([1.0, 65535.0], [1, 65535]),
        ([0.125, 0.25, 1.0, 0.0625], [2, 4, 16, 1]),
    ],
)
def test_simple_weights_are_met_exactly_with_the_shortest_pattern(weights, parts):
    total = sum(map(Fraction, weights))
    assert whole_parts([Fraction(weight) / total for weight in weights]) == parts


def test_two_to_one_is_as_even_as_can_be():
    assert chairman_pattern([2, 1]).tolist() == [0, 1, 0]
    assert chairman_pattern([1, 10]).tolist() == [1] * 5 + [0] + [1] * 5


SIZES = [[7, 1, 12, 0, 5], [3, 9], [4, 4, 4]]
PARTS = [5, 2, 3]


def make_order(seed=42):
    orders = [
        RowOrder(
            RowGroups.of(RowGroup(dataset, 0, group, rows) for group, rows in enumerate(sizes)),
            seed=seed + dataset,
            window=2,
        )
        for dataset, sizes in enumerate(SIZES)
    ]
    return MixedOrder(Schedule(PARTS), orders)


def test_each_dataset_comes_in_its_own_order_over_all_of_its_epochs():
    order = make_order()
    rows = [order[index] for index in range(200)]
    for dataset, own in enumerate(order.orders):
        taken = [row for row in rows if row.row_group.dataset == dataset]
        assert len(taken) == 20 * PARTS[dataset]
        assert taken == list(own.rows(0, len(taken)))


def test_access_at_random_equals_access_in_sequence():
    order = make_order()
    in_sequence = [order[index] for index in range(300)]
    fresh = make_order()
    for index in np.random.default_rng(0).permutation(300):
        assert fresh[int(index)] == in_sequence[index]


def test_a_row_far_out_is_found_without_those_before():
    order = make_order()
    dataset, row = order.schedule.locate(10**15 + 1)
    assert order[10**15 + 1] == order.orders[dataset][row]
    assert abs(row - 10**15 * PARTS[dataset] // 10) <= 1


def test_the_mixed_order_never_changes_between_releases():
    """Runs that were started with an older release must go on with the same rows."""
    order = make_order()
    addresses = (order[index] for index in range(150))
    text = ",".join(f"{a.row_group.dataset}/{a.row_group.group}/{a.row}" for a in addresses)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_DIGEST
    assert chairman_pattern([5, 2, 3, 1]).tolist() == GOLDEN_PATTERN
    shares = [Fraction(weight) / Fraction(7.001) for weight in (1.618, 2.718, 2.665)]
    assert whole_parts(shares) == GOLDEN_PARTS


GOLDEN_PATTERN = [0, 2, 0, 1, 0, 2, 0, 3, 1, 0, 2]
GOLDEN_PARTS = [1618, 2718, 2665]
GOLDEN_DIGEST = "40b81c8a469b0add14f90278ffaf5be56e873c8fd79605667420ae789938333b"
