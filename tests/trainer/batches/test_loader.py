"""The group loader gives every replica its rows, whatever the layout and wherever it starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from loaders import GLOBAL_BATCH, global_batches, open_loader, open_stream

from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.order.mixed_order import MixedOrder
from headrace.trainer.order.mixture import Schedule
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.sequences import RowStream
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.row_source import RowSource
from headrace.trainer.shards.shard_reader import ShardReader


@pytest.fixture
def make_loader(tiny_shards):
    manifest = read_manifest(tiny_shards)

    def make(replica=0, replicas=1, rows=None, prefetch=2, directory=tiny_shards):
        order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
        stream = open_stream(directory, manifest, order)
        stop_row = rows or 2 * order.rows_per_epoch
        return open_loader(
            stream, stop_row, manifest.sequence_len, replica, replicas, prefetch=prefetch
        )

    return make


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_global_batches_are_the_same_rows_for_any_replicas_and_read_ahead(
    make_loader, replicas, prefetch
):
    expected = global_batches([make_loader(prefetch=0)], 20)
    loaders = [make_loader(replica, replicas, prefetch=prefetch) for replica in range(replicas)]
    assert global_batches(loaders, 20) == expected


def test_a_loader_resumed_at_any_step_continues_with_the_same_batches(make_loader):
    loader = make_loader(rows=90)
    states, batches = [loader.state_dict()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert len(batches) == 12
    for step, state in enumerate(states):
        resumed = make_loader(rows=90)
        resumed.load_state_dict(state)
        rest = [batch.rows for batch in resumed]
        assert rest == [batch.rows for batch in batches[step:]]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_last_batch_holds_what_is_left_and_nothing_twice(make_loader, replicas):
    loaders = [make_loader(replica, replicas, rows=21) for replica in range(replicas)]
    keys = global_batches(loaders, 100)
    assert [len(batch) for batch in keys] == [8, 8, 5]
    assert len({key for batch in keys for key in batch}) == 21
    fresh = [make_loader(replica, replicas, rows=21) for replica in range(replicas)]
    last = [list(loader)[-1] for loader in fresh]
    assert len({len(part.rows) for part in last}) == 1, "all replicas run the same micro-batches"


def test_labels_are_the_next_token_of_the_same_document(make_loader):
    for batch in make_loader(rows=200):
        ids, labels = batch.input_ids.numpy(), batch.labels.numpy()
        for m, b in np.ndindex(*ids.shape[:2]):
            lengths = batch.document_lengths[m][b]
            assert sum(lengths) == ids.shape[2]
            ends = np.cumsum(lengths) - 1
            inside = np.setdiff1d(np.arange(ids.shape[2]), ends)
            assert (labels[m, b, ends] == -100).all()
            trained = inside[labels[m, b, inside] != -100]
            assert (labels[m, b, trained] == ids[m, b, trained + 1]).all()
            if not batch.rows[m][b]:
                assert len(trained) == 0


def test_a_short_row_is_filled_with_a_document_that_is_not_trained(make_loader, tiny_shards):
    total = read_manifest(tiny_shards).ledger.tokens_out["train"]
    loader = make_loader(
        rows=sum(shard.rows for shard in read_manifest(tiny_shards).split("train"))
    )
    batches = list(loader)
    assert sum(batch.tokens for batch in batches) == total
    assert sum(batch.input_ids.numel() for batch in batches) > total, "no short row was met"


def test_an_epoch_leaves_every_file_of_the_shards_as_it_was(make_loader, tiny_shards):
    def files():
        return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in tiny_shards.iterdir()}

    before = files()
    assert len(list(make_loader())) > 9
    assert files() == before


def test_a_shard_that_is_cut_off_stops_the_consumer_with_its_name(
    make_loader, tiny_shards, tmp_path
):
    broken = Path(shutil.copytree(tiny_shards, tmp_path / "broken"))
    for shard in broken.glob("shard-*.parquet"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"^{broken}/shard-0000\d\.parquet: row group \d+ cannot"):
        list(make_loader(directory=broken))


def test_a_flipped_byte_inside_a_page_is_noticed_while_reading(make_loader, tiny_shards, tmp_path):
    broken = Path(shutil.copytree(tiny_shards, tmp_path / "broken"))
    for shard in broken.glob("shard-*.parquet"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0x10
        shard.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        list(make_loader(directory=broken))


def test_two_shard_directories_are_shuffled_together_each_row_once(tiny_shards):
    manifest = read_manifest(tiny_shards)
    row_groups = list_row_groups([manifest, manifest], "train")
    order = RowOrder(row_groups, seed=0, window=4)
    reader = ShardReader(
        DecodedRows,
        RowSource(
            directories=[tiny_shards] * 2,
            manifests=[manifest] * 2,
            split="train",
            held_row_groups=4,
        ),
    )
    rows = [order[index] for index in range(order.rows_per_epoch)]
    assert {address.row_group.dataset for address in rows[:200]} == {0, 1}
    keys = sorted(reader.row(address).row_key for address in rows)
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == len(keys) // 2


@pytest.fixture
def make_mixed_loader(tiny_shards):
    """The same shards twice, 9 rows of the first to one of the second."""
    manifests = [read_manifest(tiny_shards)] * 2
    groups = list_row_groups(manifests, "train")

    def make(replica=0, replicas=1, prefetch=0, rows=500):
        orders = [
            RowOrder(groups.pick(groups.dataset == dataset), dataset, window=2)
            for dataset in range(2)
        ]
        order = MixedOrder(Schedule([9, 1]), orders)
        stream = RowStream(
            directories=[tiny_shards] * 2,
            manifests=manifests,
            split="train",
            order=order,
            held_row_groups=2,
            apart=True,
            epoch_end=None,
        )
        loader = open_loader(
            stream, rows, manifests[0].sequence_len, replica, replicas, prefetch=prefetch
        )
        loader.order = order
        return loader

    return make


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_global_batches_of_a_mixture_are_the_same_rows_for_any_replicas(
    make_mixed_loader, replicas
):
    expected = global_batches([make_mixed_loader()], 30)
    loaders = [make_mixed_loader(replica, replicas, prefetch=2) for replica in range(replicas)]
    assert global_batches(loaders, 30) == expected
    resumed = make_mixed_loader()
    resumed.seek(Position(13 * GLOBAL_BATCH))
    assert global_batches([resumed], 17) == expected[13:]


def test_a_mixture_reads_no_row_group_twice_in_an_epoch_of_its_dataset(make_mixed_loader):
    often, seldom = make_mixed_loader().order.orders
    stop_row = make_mixed_loader().order.schedule.index_of(0, often.rows_per_epoch - 1) + 1
    assert stop_row // 10 <= seldom.rows_per_epoch
    loader = make_mixed_loader(rows=stop_row)
    rows = [loader.order[index] for index in range(stop_row)]
    assert sum(1 for _ in loader) > 10
    assert len(often.row_groups) > 4, "the window of the first dataset must move on"
    groups = {row.row_group for row in rows}
    assert {group.dataset for group in groups} == {0, 1}
    assert loader.reader.row_groups_read == len(groups)
