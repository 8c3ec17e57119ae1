"""Rows of an epoch, and where it ends, follow from the manifests alone."""

from collections import Counter
from types import SimpleNamespace

import pytest
from data_configs import make_config, make_manifest

from headrace.trainer.batches.loader_builder import prefetch_depth
from headrace.trainer.order.data_history import open_history, segment_of
from headrace.trainer.order.data_plan import plan_data
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.sequences import train_stream
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.shard_reader import ShardReader

MANIFESTS = [make_manifest([4, 2], 100), make_manifest([3, 1], 10)]


def make_plan(*datasets, **changes):
    return plan_data(make_config(*datasets, **changes), MANIFESTS)


def make_order(*datasets, manifests=MANIFESTS, **changes):
    config = make_config(*datasets, **changes)
    data_history = make_course(config, manifests)
    return data_history, data_history.phases[-1].plan


def make_course(config, manifests):
    inputs = SimpleNamespace(train=manifests, plan=plan_data(config, manifests))
    return open_history(config, inputs, [segment_of(config, inputs)], 0)


@pytest.mark.parametrize(
    ("unit", "weights", "stop", "one_epoch", "two_epochs"),
    [
        # rows 0 1 0 | 0 1 0 | ...: the 6th of d0 is the 9th row, the 4th of d1 the 11th
        ("rows", (2.0, 1.0), "first_exhausted", 9, 18),
        ("rows", (2.0, 1.0), "all_exhausted", 11, 23),
        # equal tokens are 1 row to 10, with d0 in the middle: d1 ends at 4, d0 at 5 * 11 + 6
        ("tokens", (1.0, 1.0), "first_exhausted", 4, 9),
        ("tokens", (1.0, 1.0), "all_exhausted", 61, 127),
        ("tokens", (10.0, 1.0), "first_exhausted", 8, 16),
        ("tokens", (10.0, 1.0), "all_exhausted", 11, 23),
    ],
)
def test_interleaved_epochs_end_with_the_row_that_exhausts(
    unit, weights, stop, one_epoch, two_epochs
):
    datasets = [{"weight": weight} for weight in weights]
    keys = {"mixing": "interleave", "mixing_unit": unit, "mixing_stop": stop}
    plan = make_plan(*datasets, **keys)
    assert (plan.rows_in(1), plan.rows_in(2)) == (one_epoch, two_epochs)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({}, 6),
        ({"repeats": 3}, 18),
        ({"max_tokens": 250}, 2),
        ({"max_tokens": 250, "repeats": 3}, 2),
        ({"max_tokens": 700}, 6),
        ({"max_tokens": 700, "repeats": 2}, 7),
    ],
)
def test_repeats_and_token_limits_give_whole_rows(keys, rows):
    plan = make_plan(keys, {})
    assert plan.dataset_rows == [rows, 4]
    assert plan.rows_in(2) == 2 * (rows + 4)


def count_rows(order, first, stop):
    return Counter(
        (address.row_group.dataset, address.row_group.group, address.row)
        for address in (order[index] for index in range(first, stop))
    )


ROWS = {(0, 0, row) for row in range(4)} | {(0, 1, row) for row in range(2)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_concatenated_rows_come_as_often_as_they_are_repeated(shuffle):
    order, plan = make_order({"repeats": 3}, {}, loader={"shuffle": shuffle})
    for epoch in range(3):
        counts = count_rows(order, epoch * plan.rows_in(1), (epoch + 1) * plan.rows_in(1))
        assert {row for row in counts if row[0] == 0} == ROWS
        assert all(count == (3 if row[0] == 0 else 1) for row, count in counts.items())
        assert len(counts) == 10


def test_a_token_limit_shows_other_rows_in_the_next_epoch():
    order, plan = make_order({"max_tokens": 250}, {})
    assert plan.rows_in(1) == 2 + 4
    epochs = [count_rows(order, 6 * epoch, 6 * epoch + 6) for epoch in range(3)]
    limited = [{row for row in counts if row[0] == 0} for counts in epochs]
    assert [len(rows) for rows in limited] == [2, 2, 2]
    assert set.union(*limited) == ROWS
    assert all(sum(row[0] == 1 for row in counts) == 4 for counts in epochs)


def test_interleaved_rows_come_as_often_as_they_are_repeated():
    keys = {"mixing": "interleave", "mixing_unit": "rows"}
    order, plan = make_order({"weight": 4.0, "repeats": 2}, {"weight": 1.0}, **keys)
    counts = count_rows(order, 0, plan.rows_in(1))
    assert {row: count for row, count in counts.items() if row[0] == 0} == dict.fromkeys(ROWS, 2)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("manifests", [MANIFESTS[:1], MANIFESTS])
def test_plain_datasets_keep_the_order_that_they_had_before_there_were_mixtures(manifests, shuffle):
    order, plan = make_order(
        *({} for _ in manifests), manifests=manifests, loader={"shuffle": shuffle}, seed=3
    )
    before = RowOrder(list_row_groups(manifests, "train"), 3, window=4, shuffle=shuffle)
    rows = 3 * before.rows_per_epoch
    assert plan.rows_in(3) == rows
    assert [order[index] for index in range(rows)] == list(before.rows(0, rows))


def test_the_same_shards_twice_are_shuffled_apart():
    order, _ = make_order({}, {}, manifests=[make_manifest([50], 10)] * 2, mixing="interleave")
    assert [order[i].row for i in range(0, 40, 2)] != [order[i].row for i in range(1, 40, 2)]


@pytest.mark.parametrize("mixing", ["concatenate", "interleave"])
def test_row_groups_are_held_for_each_dataset_only_when_interleaved(mixing):
    config = make_config({}, {}, mixing=mixing)
    reader = ShardReader(DecodedRows, train_stream(config, make_course(config, MANIFESTS)))
    assert (reader.held_row_groups, reader.apart) == (4, mixing == "interleave")


@pytest.mark.parametrize(
    ("settings", "depth"),
    [
        ({}, 2),
        ({"prefetch_batches": 5}, 5),
        ({"prefetch_batches": 5, "prefetch_bytes": 3 * 8 * 8 * 100}, 3),
        ({"prefetch_batches": 5, "prefetch_bytes": 0}, 1),
        ({"prefetch_batches": 0}, 0),
    ],
)
def test_as_many_batches_are_read_ahead_as_fit(settings, depth):
    config = make_config({}, micro_batch_size=2, loader=settings)
    assert prefetch_depth(config, micro_batches=4, capacity=100) == depth
