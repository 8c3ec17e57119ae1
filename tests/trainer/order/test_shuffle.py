"""The order of a million rows cannot be told from a uniform one; each row once an epoch."""

import numpy as np
import pytest

from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import RowGroup, RowGroups

ROWS, GROUP_ROWS, EPOCHS = 1_000_000, 1000, 3
BINS = 100
GROUPS = RowGroups.of(RowGroup(0, group // 100, group % 100, GROUP_ROWS) for group in range(1000))


@pytest.fixture(scope="module")
def epochs():
    """[epoch, position] the number of the row, in file order, at each position."""
    order = RowOrder(GROUPS, seed=20, window=4)
    addresses = order.rows(0, EPOCHS * ROWS)
    numbers = np.fromiter(
        ((group.shard * 100 + group.group) * GROUP_ROWS + row for group, row in addresses),
        dtype=np.int64,
        count=EPOCHS * ROWS,
    )
    return numbers.reshape(EPOCHS, ROWS)


@pytest.fixture(scope="module")
def documents():
    """The rank that each row, in file order, had before shards were shuffled by hashed key."""
    return np.random.default_rng(7).permutation(ROWS)


def deviations(chi_square, freedom):
    """Standard normal, to a good approximation, for so many degrees of freedom."""
    return (chi_square - freedom) / np.sqrt(2 * freedom)


def chi_square(first, first_size, second, second_size):
    """Of the table of two integers, uniform below their sizes, against independence."""
    cells = first * BINS // first_size * BINS + second * BINS // second_size
    table = np.bincount(cells, minlength=BINS**2)
    expected = len(first) / BINS**2
    return deviations(((table - expected) ** 2 / expected).sum(), (BINS - 1) ** 2)


def test_every_row_comes_once_an_epoch_and_no_two_epochs_agree(epochs):
    for numbers in epochs:
        assert np.array_equal(np.sort(numbers), np.arange(ROWS))
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert (epochs[one] == epochs[other]).sum() <= 8, "1 is expected"


def test_positions_do_not_depend_on_where_a_row_came_from(epochs, documents):
    for numbers in epochs:
        assert abs(chi_square(np.arange(ROWS), ROWS, documents[numbers], ROWS)) < 4.5


def test_neighbors_do_not_depend_on_each_other(epochs, documents):
    for numbers in epochs:
        ranks = documents[numbers]
        assert abs(chi_square(ranks, ROWS, np.roll(ranks, 1), ROWS)) < 4.5
        assert abs(np.corrcoef(ranks, np.roll(ranks, 1))[0, 1]) * np.sqrt(ROWS) < 4.5
        assert (np.abs(np.diff(ranks)) == 1).sum() <= 12, "2 are expected"


def test_inside_a_window_rows_are_as_good_as_drawn(epochs):
    """Positions against places in the row group, and the other groups of the window."""
    window = 4 * GROUP_ROWS
    place = np.arange(ROWS) % window
    for numbers in epochs:
        assert abs(chi_square(place, window, numbers % GROUP_ROWS, GROUP_ROWS)) < 4.5
        groups = (numbers // GROUP_ROWS).reshape(-1, window)
        assert all(len(set(held)) == 4 for held in groups.tolist())
        same = (groups[:, 1:] == groups[:, :-1]).mean()
        assert same == pytest.approx((GROUP_ROWS - 1) / (window - 1), abs=0.002)


def test_over_many_epochs_every_row_group_comes_everywhere_equally_often():
    order = RowOrder(RowGroups.of(RowGroup(0, 0, group, 1) for group in range(50)), 3, window=4)
    epochs = 1000
    table = np.zeros((50, 50))
    for epoch in range(epochs):
        groups = [a.row_group.group for a in order.rows(50 * epoch, 50 * (epoch + 1))]
        table[groups, range(50)] += 1
    expected = epochs / 50
    # rows and columns add up to 1,000 each: 49 * 49 degrees of freedom
    assert abs(deviations(((table - expected) ** 2 / expected).sum(), 49 * 49)) < 4.5
    following = np.zeros((50, 50))
    for epoch in range(epochs):
        groups = [a.row_group.group for a in order.rows(50 * epoch, 50 * (epoch + 1))]
        np.add.at(following, (groups[:-1], groups[1:]), 1)
    off = following[~np.eye(50, dtype=bool)]
    expected = epochs * 49 / (50 * 49)
    assert abs(deviations(((off - expected) ** 2 / expected).sum(), 49 * 49)) < 4.5
