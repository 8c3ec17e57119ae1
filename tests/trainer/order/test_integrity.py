"""Damaged shards are found, named, and replaced in one way when the config allows it."""

import errno
import json
import random
import re
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loaders import open_loader, open_stream
from runs import make_shards

from headrace.schemas.errors import DataError, StorageError
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.train.data_config import LoaderConfig
from headrace.schemas.train.run_state import RunState, read_run_state, write_run_state
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.order.integrity import verify_shards
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.sequences import count_sequences
from headrace.trainer.shards.quarantine import describe, merge, write_quarantine
from headrace.trainer.shards.row_group_source import RowGroupSource
from headrace.trainer.shards.row_groups import CorruptRowGroupError, RowGroup, list_row_groups
from headrace.trainer.shards.shard_reader import ShardReader
from headrace.trainer.shards.storage import LocalStorage

QUARANTINE = LoaderConfig(on_corrupt="quarantine")


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def flip_bit(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def damage_row_group(directory, shard=0, group=1):
    record = read_manifest(directory).split("train")[shard]
    place = record.row_groups[group]
    flip_bit(directory / record.file, place.byte_offset + place.bytes // 2)
    return directory / record.file, place


def unreadable(source):
    """Numbers of the row groups of the first file that cannot be read, with the messages."""
    found = {}
    for group, record in enumerate(source.files[0][0].record.row_groups):
        try:
            source.read(RowGroup(0, 0, group, record.rows))
        except CorruptRowGroupError as error:
            found[group] = str(error)
    return found


def check_flipped_bits(shards, flips):
    """Wherever a bit is flipped in a file, exactly the row groups that it concerns are refused."""
    choose = random.Random(flips)
    manifest = read_manifest(shards)
    record = manifest.split("train")[0]
    path = shards / record.file
    for _ in range(flips):
        byte, bit = choose.randrange(4, record.bytes), choose.randrange(8)
        flip_bit(path, byte, bit)
        found = unreadable(RowGroupSource([shards], [manifest], "train", LoaderConfig()))
        hit = [
            number
            for number, group in enumerate(record.row_groups)
            if group.byte_offset <= byte < group.byte_offset + group.bytes
        ]
        assert list(found) == (hit or list(range(len(record.row_groups)))), (byte, bit)
        for number, message in found.items():
            assert message.startswith(f"{path}: row group {number} cannot be read, rows ")
        flip_bit(path, byte, bit)


def test_a_flipped_bit_is_found_wherever_it_is(shards):
    check_flipped_bits(shards, 12)


@pytest.mark.exhaustive
def test_three_hundred_flipped_bits_are_found_wherever_they_are(shards):
    check_flipped_bits(shards, 300)


def test_the_message_names_shard_row_group_rows_and_remedy(shards):
    path, _ = damage_row_group(shards)
    source = RowGroupSource([shards], [read_manifest(shards)], "train", LoaderConfig())
    with pytest.raises(CorruptRowGroupError) as caught:
        source.read(RowGroup(0, 0, 1, 16))
    assert str(caught.value) == (
        f"{path}: row group 1 cannot be read, rows 16 to 31 (its bytes are not those that were "
        'written); restore the file, or set loader.on_corrupt = "quarantine" to train on other '
        "rows in their place"
    )


def without_checksums(manifest):
    """As an earlier release wrote it."""
    shards = [
        shard.model_copy(
            update={
                "footer_crc32": None,
                "row_groups": [g.model_copy(update={"crc32": None}) for g in shard.row_groups],
            }
        )
        for shard in manifest.shards
    ]
    return manifest.model_copy(update={"shards": shards})


def test_page_checksums_find_damage_where_the_manifest_has_none(shards):
    manifest = without_checksums(read_manifest(shards))
    source = RowGroupSource([shards], [manifest], "train", LoaderConfig())
    assert unreadable(source) == {}
    damage_row_group(shards)
    assert list(unreadable(source)) == [1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer": 50}, r"ids from \d+ to \d+, the tokenizer has 50"),
        ({"sequence_len": 20}, r"rows of \d+ to 64 tokens, not 1 to 20"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused(tiny_shards, change, problem):
    manifest = read_manifest(tiny_shards)
    if "tokenizer" in change:
        small = manifest.tokenizer.model_copy(update={"vocabulary_size": change["tokenizer"]})
        change = {"tokenizer": small}
    manifest = manifest.model_copy(update=change)
    found = unreadable(RowGroupSource([tiny_shards], [manifest], "train", LoaderConfig()))
    assert len(found) == len(manifest.shards[0].row_groups)
    assert all(re.search(problem, message) for message in found.values())


# --- checking at start ---


def start(shards, **loader):
    config = TrainConfig.model_validate(
        {
            "model": "m",
            "output_dir": "o",
            "optimizer": {"lr": 1.0},
            "datasets": [{"path": str(shards)}],
            "evaluation_datasets": [{"path": str(shards)}],
            "loader": loader,
        }
    )
    manifest = read_manifest(shards)
    verify_shards(config, SimpleNamespace(train=[manifest], evaluation=[manifest]))


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE = {
    "flip": lambda path: flip_bit(path, 1000),
    "lengthen": lengthen,
    "remove": lambda path: path.unlink(),
}
FOUND = {
    ("flip", "full"): "damaged (its SHA-256 differs); restore the file",
    ("lengthen", "size"): " were written; restore the file",
    ("lengthen", "full"): " were written; restore the file",
    ("remove", "size"): "missing; restore it, or prepare the directory again",
    ("remove", "full"): "missing; restore it, or prepare the directory again",
}


@pytest.mark.parametrize("verify", ["full", "size", "off"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["shard-00001.parquet", "evaluation-00000.parquet"])
def test_files_are_checked_at_start_as_far_as_was_asked(shards, verify, damage, file):
    start(shards, verify=verify)
    DAMAGE[damage](shards / file)
    message = FOUND.get((damage, verify))
    if message is None:
        start(shards, verify=verify)
        return
    with pytest.raises(DataError) as caught:
        start(shards, verify=verify)
    assert str(caught.value).startswith(f"{shards}/{file}: ")
    assert message in str(caught.value)


def test_with_quarantine_what_is_damaged_at_start_is_only_told(shards, caplog):
    DAMAGE["remove"](shards / "shard-00001.parquet")
    start(shards, verify="full", on_corrupt="quarantine")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{shards}/shard-00001.parquet: missing; restore it, or prepare the directory again"
    ]


def other_version(schema):
    return schema.with_metadata({**schema.metadata, b"format_version": b"9"})


def other_ids(schema):
    place = schema.get_field_index("input_ids")
    return schema.set(place, schema.field(place).with_type(pa.list_(pa.int64())))


def rewrite(shards, file, schema, known):
    """Write a real shard anew in another schema; `known`: its manifest has it as it then lies."""
    manifest = read_manifest(shards)
    (record,) = [shard for shard in manifest.shards if shard.file == file]
    path = shards / file
    table = pq.read_table(path)
    table = table.cast(schema(table.schema))
    size = record.row_groups[0].rows
    pq.write_table(table, path, row_group_size=size)
    if known:
        with pq.ParquetFile(path) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        places = [
            old.model_copy(update={"byte_offset": 4, "bytes": group.total_byte_size, "crc32": None})
            for old, group in zip(record.row_groups, groups, strict=True)
        ]
        changes = {"bytes": path.stat().st_size, "footer_crc32": None, "row_groups": places}
        others = [shard for shard in manifest.shards if shard.file != file]
        new = record.model_copy(update=changes)
        write_manifest(shards, manifest.model_copy(update={"shards": [*others, new]}))


@pytest.mark.parametrize("on_corrupt", ["stop", "quarantine"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["shard-00002.parquet", "evaluation-00000.parquet"])
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (other_version, "its footer has format_version = '9', this release reads '1'"),
        (other_ids, "column input_ids holds list<"),
    ],
)
def test_a_shard_of_another_schema_or_version_is_refused_before_a_run_starts(
    shards, schema, message, file, known, on_corrupt
):
    start(shards)
    rewrite(shards, file, schema, known)
    with pytest.raises(DataError) as caught:
        start(shards, on_corrupt=on_corrupt)
    assert str(caught.value).startswith(f"{shards}/{file}: ")
    assert message in str(caught.value) or (not known and on_corrupt == "stop")


def test_a_footer_with_other_row_groups_than_its_manifest_is_damage(shards, caplog):
    rewrite(shards, "shard-00001.parquet", lambda schema: schema, known=True)
    manifest = read_manifest(shards)
    *others, last = manifest.shards
    first, second, *rest = last.row_groups
    more = first.model_copy(update={"rows": first.rows + 1})
    fewer = second.model_copy(update={"rows": second.rows - 1})
    moved = [more, fewer, *rest]
    changed = last.model_copy(update={"row_groups": moved})
    write_manifest(shards, manifest.model_copy(update={"shards": [*others, changed]}))
    with pytest.raises(DataError, match=r"shard-00001\.parquet: its footer is damaged \(\d+ rows"):
        start(shards)
    start(shards, on_corrupt="quarantine")
    assert "rows, the manifest says" in caplog.text


def test_a_damaged_footer_is_found_at_start_though_the_size_is_right(shards):
    path = shards / "shard-00001.parquet"
    flip_bit(path, path.stat().st_size - 20)
    with pytest.raises(
        DataError, match=r"its footer is damaged .its bytes are not those that were"
    ):
        start(shards)
    start(shards, verify="off")


# --- quarantine ---


def read_rows(shards, replicas=1, first=0, records=(), rows=None, config=QUARANTINE):
    """Ids of every row of the global batches from row `first` on, and what was given up."""
    manifest = read_manifest(shards)
    order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
    loaders = []
    for replica in range(replicas):
        stream = open_stream(shards, manifest, order, config)
        stop_row = rows or 2 * order.rows_per_epoch
        loader = open_loader(stream, stop_row, manifest.sequence_len, replica, replicas)
        loader.reader.quarantine.restore(records)
        loader.seek(Position(first))
        loaders.append(loader)
    ids = []
    for parts in zip(*loaders, strict=True):
        for micro_batches in zip(*(part.input_ids for part in parts), strict=True):
            ids += [micro_batch.numpy().tobytes() for micro_batch in micro_batches]
    found = [record for loader in loaders for record in loader.reader.quarantine.take_new()]
    return ids, merge([], found)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_rows_are_replaced_in_the_same_way_on_every_layout(tiny_shards, shards, damage):
    path, _ = damage_row_group(shards)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "remove":
        path.unlink()
    whole, nothing = read_rows(tiny_shards)
    assert nothing == []
    ids, records = read_rows(shards)
    assert {record.file for record in records} == {str(path)}
    groups = [record.row_group for record in records]
    assert groups == ([1] if damage == "flip" else list(range(len(groups))))
    damaged_rows = 2 * sum(record.rows for record in records)  # in two epochs
    changed = sum(a != b for a, b in zip(ids, whole, strict=True))
    assert 0.9 * damaged_rows <= changed <= damaged_rows  # few rows are equal by chance
    for replicas in (2, 4):
        assert read_rows(shards, replicas) == (ids, records)


def test_a_resumed_run_replaces_the_same_rows_even_when_the_file_was_restored(tiny_shards, shards):
    damage_row_group(shards)
    ids, records = read_rows(shards)
    for first in (0, 8 * 11, 8 * 40):
        assert read_rows(shards, first=first, records=records) == (ids[first:], [])
    shutil.copytree(tiny_shards, shards, dirs_exist_ok=True)
    assert read_rows(shards, records=records) == (ids, [])
    assert read_rows(shards, records=records, config=LoaderConfig()) == (ids, [])
    assert read_rows(shards) == read_rows(tiny_shards)


def test_a_substitute_that_is_damaged_too_is_passed_over(shards):
    damage_row_group(shards)
    _, (first,) = read_rows(shards)
    names = [shard.file for shard in read_manifest(shards).split("train")]
    index = names.index(first.substitute_file.rsplit("/", 1)[1])
    damage_row_group(shards, index, first.substitute_row_group)
    ids, records = read_rows(shards)
    assert len(records) == 2
    assert {record.row_group for record in records} == {1, first.substitute_row_group}
    assert records != [first, first]
    assert read_rows(shards, 4) == (ids, records)


def test_places_are_counted_over_the_rows_that_a_run_has_in_place_of_damaged_ones(
    tiny_model, tmp_path
):
    shards = make_shards(tiny_model, tmp_path / "documents", packing="none", overlong="truncate")
    manifest = read_manifest(shards)
    order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
    config = QUARANTINE.model_copy(update={"pack": "best_fit"})
    stream = open_stream(shards, manifest, order, config)
    whole = shutil.copytree(shards, tmp_path / "whole")

    def count(replaced=()):
        reader = ShardReader(stream.facts, stream)
        reader.quarantine.restore(replaced)
        return count_sequences(64, stream, reader, order.rows_per_epoch, Position())

    before = count()
    for group in range(len(manifest.split("train")[0].row_groups)):
        damage_row_group(shards, 0, group)
    loader = open_loader(stream, order.rows_per_epoch, 64, pack="best_fit")
    places = sum(len(place) > 0 for batch in loader for rows in batch.rows for place in rows)
    records = loader.reader.quarantine.take_new()
    assert count() == places
    shutil.copytree(whole, shards, dirs_exist_ok=True)
    assert count(records) == places
    assert count() == before != places


def test_a_checkpoint_and_the_run_directory_keep_what_was_replaced(shards, tmp_path):
    damage_row_group(shards)
    _, records = read_rows(shards)
    state = RunState(
        step=1,
        next_row=8,
        seed=0,
        tokens=1,
        seconds=1.0,
        global_batch_rows=8,
        stages=1,
        replicas=1,
        config_fingerprint="",
        data_fingerprint="",
        files={},
        quarantined=records,
    )
    write_run_state(tmp_path, state)
    assert read_run_state(tmp_path).quarantined == records
    write_quarantine(tmp_path, records)
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["row_group"], told["first_row"], told["rows"]) == (1, 16, 16)
    assert describe(records[0]).startswith(f"{shards}/shard-00000.parquet: row group 1, rows 16 to")


def test_a_dataset_that_is_gone_stops_the_run(shards):
    for path in shards.glob("shard-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"; 5\d others of its dataset cannot be read either"):
        read_rows(shards)


def test_an_error_that_is_no_damage_stops_the_run_even_with_quarantine(tiny_shards, monkeypatch):
    def fail(storage, file, offset, size):
        raise OSError(errno.EMFILE, "Too many open files", file)

    monkeypatch.setattr(LocalStorage, "read", fail)
    with pytest.raises(StorageError, match="Too many open files"):
        read_rows(tiny_shards)


def test_without_quarantine_damage_stops_the_run(shards):
    damage_row_group(shards)
    with pytest.raises(DataError, match="row group 1 cannot be read, rows 16 to 31"):
        read_rows(shards, config=LoaderConfig())


def test_data_that_ends_before_the_last_step_says_what_to_do():
    feed = Feed(SimpleNamespace(leads=True), iter(()))
    with pytest.raises(DataError, match=r"before the last step.*continue with --resume"):
        feed.next()
