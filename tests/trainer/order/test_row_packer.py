"""Rows are packed into places exactly, and the packing goes on from any position."""

import itertools
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import end_of_epoch

from headrace.schemas.errors import DataError
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.order.row_packer import Candidate, RowPacker

ROOM = 50


def make_packer(lengths, position=None, **changes):
    """Rows of such lengths, over and over; the item of a row is its index."""
    keys = {
        "tokens": ROOM,
        "look_ahead": 8,
        "overlong": "error",
        "epoch_end": partial(end_of_epoch, len(lengths)),
        "stop_row": len(lengths),
    }
    return RowPacker(
        lambda index: Candidate(lengths[index % len(lengths)], index),
        **keys | changes,
        position=position or Position(),
    )


def pack(*arguments, **changes):
    return make_packer(*arguments, **changes).take(1 << 20)


lengths_of_rows = st.lists(st.integers(1, ROOM), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths_of_rows, st.integers(1, 12), st.integers(1, 3))
def test_every_row_is_placed_once_and_no_place_overflows(lengths, look_ahead, epochs):
    rows = epochs * len(lengths)
    places = pack(lengths, look_ahead=look_ahead, stop_row=rows)
    assert sorted(itertools.chain(*places)) == list(range(rows))
    assert all(sum(lengths[row % len(lengths)] for row in place) <= ROOM for place in places)
    epochs_of_places = [{row // len(lengths) for row in place} for place in places]
    assert all(len(epochs) == 1 for epochs in epochs_of_places)
    assert [max(epochs) for epochs in epochs_of_places] == sorted(map(max, epochs_of_places))


@settings(deadline=None, max_examples=40)
@given(lengths_of_rows, st.integers(1, 12), st.sampled_from(["truncate", "drop"]))
def test_resumed_after_any_place_the_rest_is_the_same(lengths, look_ahead, overlong):
    keys = {"look_ahead": look_ahead, "overlong": overlong, "tokens": 30}
    keys["stop_row"] = 2 * len(lengths)
    packer = make_packer(lengths, **keys)
    places, positions = [], []
    while place := packer.take(1):
        places += place
        positions.append(packer.position)
    counted = packer.take_overlong()
    assert places == pack(lengths, **keys)
    for number, position in enumerate(positions, 1):
        resumed = make_packer(lengths, position, **keys)
        assert resumed.take(1 << 20) == places[number:]
        assert resumed.take_overlong().rows <= counted.rows


def test_a_place_takes_the_row_that_waits_longest_then_the_longest_that_fit():
    lengths = [10, 41, 30, 40, 20, 9, 39, 10]
    assert pack(lengths) == [[0, 3], [1, 5], [2, 4], [6, 7]]
    assert pack(lengths, look_ahead=2) == [[0], [1], [2], [3], [4, 5], [6, 7]]


def test_no_row_waits_for_more_places_than_are_looked_ahead():
    lengths = [26] + [24, 25] * 500
    order = {row: n for n, place in enumerate(pack(lengths, look_ahead=5)) for row in place}
    first_seen = {row: min(order[r] for r in range(max(0, row - 4), row + 1)) for row in order}
    assert all(order[row] - first_seen[row] <= 5 for row in order)


def test_two_thirds_of_short_rows_leave_few_tokens_empty():
    lengths = [1 + (index * 7919) % 2000 for index in range(20_000)]
    places = pack(lengths, tokens=4096, look_ahead=256)
    assert sum(lengths) / (4096 * len(places)) > 0.995
    unpacked = sum(lengths) / (4096 * len(lengths))
    assert unpacked < 0.25


def test_a_row_longer_than_a_place_is_refused_cut_or_left_out_and_counted():
    lengths = [20, 70, 60, 30]
    with pytest.raises(DataError, match=r"^row 1 of the order has 70 tokens, more than the 50 of"):
        pack(lengths)
    packer = make_packer(lengths, overlong="truncate")
    assert packer.take(9) == [[0, 3], [1], [2]]
    assert packer.take_overlong() == OverlongCount(2, 20 + 10)
    assert packer.take_overlong() == OverlongCount()
    packer = make_packer(lengths, overlong="drop")
    assert packer.take(9) == [[0, 3]]
    assert packer.take_overlong() == OverlongCount(2, 70 + 60)


def test_rows_that_were_looked_at_before_the_checkpoint_are_not_counted_again():
    packer = make_packer([20, 70, 60, 30], overlong="truncate")
    packer.take(1)
    assert packer.take_overlong().rows == 2
    resumed = make_packer([20, 70, 60, 30], packer.position, overlong="truncate")
    assert resumed.take(9) == [[1], [2]]
    assert resumed.take_overlong() == OverlongCount()


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_whose_last_rows_are_dropped_does_not_end_the_run(epochs):
    keys = {"overlong": "drop", "look_ahead": 1, "stop_row": epochs * 3}
    assert pack([40, 60, 60], **keys) == [[3 * epoch] for epoch in range(epochs)]


def test_data_of_nothing_but_overlong_rows_is_an_error_and_not_an_endless_search(monkeypatch):
    monkeypatch.setattr("headrace.trainer.order.row_packer.MOST_DROPPED", 100)
    with pytest.raises(DataError, match="more than 100 rows in a row have more than the 50 tokens"):
        pack([60], overlong="drop", stop_row=None)
