"""Shard directories from elsewhere: what breaks the contract is named, and not trained on."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.passes.shard_writer import describe_row_group, with_checksums
from headrace.dataprep.shards.inspection import row_groups
from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import parse_manifest, read_manifest, write_manifest
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_checks import MAX_UNPACKED_BYTES
from headrace.schemas.shards.shard_format import shard_schema
from headrace.schemas.train.data_config import LoaderConfig
from headrace.trainer.order.row_order import RowGroup
from headrace.trainer.shards.decoded_rows import DecodedRows, RowFacts
from headrace.trainer.shards.row_group_source import RowGroupSource

LOOSE = shard_schema().remove_metadata()
FORMAT = shard_schema().metadata


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def rewrite(directory, table, tokens=None, **options):
    """Put a table in place of the first shard, with a manifest that has right checksums for it."""
    manifest = read_manifest(directory)
    record = manifest.split("train")[0]
    path = directory / record.file
    rows = table.num_rows
    pq.write_table(table, path, **parquet_options() | {"column_encoding": None} | options)
    tokens = tokens or max(rows, manifest.sequence_len)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        lists = pa.table({"input_ids": pa.array([[0]] * rows, pa.list_(pa.int32()))})
        place = describe_row_group(group, lists).model_copy(update={"tokens": tokens})
    new = record.model_copy(
        update={
            "rows": rows,
            "tokens": tokens,
            "bytes": path.stat().st_size,
            "row_groups": [place],
        }
    )
    new = with_checksums(path, new)
    changed = manifest.model_copy(
        update={"shards": [new if s.file == record.file else s for s in manifest.shards]}
    )
    write_manifest(directory, changed)
    return path


def read_first(directory, columns=DecodedRows.COLUMNS):
    source = RowGroupSource(
        [directory], [read_manifest(directory)], "train", LoaderConfig(), columns
    )
    record = source.files[0][0].record.row_groups[0]
    return source.read(RowGroup(0, 0, 0, record.rows))


def rows_with(**changes):
    """Three sound rows, but for some columns."""
    columns = {
        "input_ids": pa.array([[5, 6], [7], [8, 9, 10]], pa.list_(pa.int32())),
        "loss_mask": pa.array([None, [True], None], pa.list_(pa.bool_())),
        "document_lengths": pa.array([[2], [1], [1, 2]], pa.list_(pa.int32())),
        "source": pa.array(["a", "a", "a"]).dictionary_encode(),
        "row_key": pa.array([1, 2, 3], pa.uint64()),
        "control_class": pa.array([None, 1, 0], pa.int8()),
    }
    columns |= {name: value for name, value in changes.items() if value is not None}
    columns = {name: columns[name] for name in columns if changes.get(name, 0) is not None}
    return pa.table(columns).replace_schema_metadata(FORMAT)


def lists(values, kind=None):
    return pa.array(values, pa.list_(kind or pa.int32()))


BROKEN_ROWS = {
    "negative id": ({"input_ids": lists([[5, 6], [-7], [8, 9, 10]])}, "column input_ids, row 1: "),
    "beyond the vocabulary": (
        {"input_ids": lists([[5, 6], [7], [8, 1 << 30, 10]])},
        "column input_ids, row 2: id 1073741824; ",
    ),
    "null ids": ({"input_ids": lists([[5, 6], None, [8, 9, 10]])}, "column input_ids, row 1: null"),
    "a null id": (
        {"input_ids": lists([[5, None], [7], [8, 9, 10]])},
        "column input_ids, row 0: a null among",
    ),
    "empty row": (
        {"input_ids": lists([[5, 6], [], [8, 9, 10]]), "document_lengths": lists([[2], [], [3]])},
        "column input_ids, row 1: rows of 0 to 3 tokens",
    ),
    "null lengths": (
        {"document_lengths": lists([[2], None, [3]])},
        "column document_lengths, row 1: null",
    ),
    "length 0": ({"document_lengths": lists([[2], [0, 1], [3]])}, "column document_lengths"),
    "negative length": (
        {"document_lengths": lists([[3, -1], [1], [3]])},
        "column document_lengths",
    ),
    "lengths that overflow": (
        {"document_lengths": lists([[2], [(1 << 31) - 1] * 2 + [3], [3]])},
        "column document_lengths",
    ),
    "lengths that do not sum": (
        {"document_lengths": lists([[1], [2], [3]])},
        "column document_lengths, row 0: document_lengths do not sum",
    ),
    "a short mask": (
        {"loss_mask": lists([None, None, [True]], pa.bool_())},
        "column loss_mask, row 2: loss_mask is not as long",
    ),
    "a null in a mask": (
        {"loss_mask": lists([None, [None], None], pa.bool_())},
        "column loss_mask, row 1: a null among",
    ),
    "null key": ({"row_key": pa.array([1, None, 3], pa.uint64())}, "column row_key, row 1: null"),
    "null source": (
        {"source": pa.array(["a", None, "a"]).dictionary_encode()},
        "column source, row 1: null",
    ),
    "class 9": (
        {"control_class": pa.array([None, 9, 0], pa.int8())},
        "column control_class, row 1: 9, not",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ROWS)
@pytest.mark.parametrize("encoding", [None, {"input_ids.list.element": "BYTE_STREAM_SPLIT"}])
def test_a_row_that_breaks_the_contract_is_named(shards, case, encoding):
    changes, message = BROKEN_ROWS[case]
    path = rewrite(shards, rows_with(**changes), column_encoding=encoding)
    with pytest.raises(DataError) as caught:
        read_first(shards)
    text = str(caught.value)
    assert text.startswith(f"{path}: row group 0 cannot be read, rows 0 to 2 ({message}"), text
    assert "\n" not in text


@pytest.mark.parametrize("case", ["null lengths", "length 0", "negative length", "null key"])
def test_what_the_plan_reads_is_checked_without_the_ids(shards, case):
    changes, message = BROKEN_ROWS[case]
    rewrite(shards, rows_with(**changes))
    with pytest.raises(DataError, match=message.partition(",")[0]):
        read_first(shards, RowFacts.COLUMNS)


BROKEN_FILES = {
    "float ids": (
        rows_with(input_ids=lists([[5, 6], [7], [8, 9, 10]], pa.float32())),
        "column input_ids holds list<",
    ),
    "an int32 mask": (
        rows_with(loss_mask=lists([None, [1], None])),
        "column loss_mask holds list<",
    ),
    "no lengths": (rows_with(document_lengths=None), "column document_lengths is missing"),
    "no ids": (rows_with(input_ids=None), "column input_ids is missing"),
    "no keys": (rows_with(row_key=None), "column row_key is missing"),
    "version 9": (
        rows_with().replace_schema_metadata({**FORMAT, b"format_version": b"9"}),
        "its footer has format_version = '9', this release reads '1'",
    ),
    "no format": (rows_with().replace_schema_metadata(None), "its footer has format = ''"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_file_of_another_schema_or_version_is_refused(shards, case):
    table, message = BROKEN_FILES[case]
    path = rewrite(shards, table)
    with pytest.raises(DataError) as caught:
        read_first(shards)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_file_of_an_earlier_release_without_control_classes_is_read(shards):
    rewrite(shards, rows_with(control_class=None))
    rows = DecodedRows(read_first(shards))
    assert rows.row(2).input_ids.tolist() == [8, 9, 10]
    assert rows.row(2).control_class is None


# --- files that unpack to more than they should ---


def bomb(tokens):
    ids = pa.ListArray.from_arrays(
        pa.array([0, tokens], pa.int32()), pa.array(np.zeros(tokens, np.int32))
    )
    return rows_with().slice(0, 1).set_column(0, LOOSE.field("input_ids"), ids)


def test_a_row_group_that_unpacks_to_more_than_declared_is_refused_with_sizes(shards):
    path = rewrite(shards, bomb(4 << 20))
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"it unpacks to [\d,]+ bytes, at most [\d,]+ are allowed"):
        read_first(shards)
    manifest = read_manifest(shards)
    with pytest.raises(DataError, match="it unpacks to"):
        list(row_groups(shards, manifest, manifest.split("train")[0]))


def test_no_declared_size_allows_more_than_the_limit(shards):
    body = read_manifest(shards).model_dump(mode="json")
    group = body["shards"][0]["row_groups"][0]
    group["tokens"] = MAX_UNPACKED_BYTES
    with pytest.raises(ValueError, match="tokens"):
        Manifest.model_validate(body)


def test_pages_that_unpack_to_more_than_the_footer_says_are_refused(shards, monkeypatch):
    """The footer may lie: what Arrow reserves is what the pages' own headers ask for."""
    from headrace.schemas.shards import parquet_pages

    real = parquet_pages.page_header

    def lying(content, name):
        header, length = real(content, name)
        return header | {parquet_pages.UNPACKED: 1 << 31}, length

    monkeypatch.setattr(parquet_pages, "page_header", lying)
    with pytest.raises(DataError, match=r"its pages unpack to [\d,]+ bytes, the footer says"):
        read_first(shards)


# --- manifests ---


def changed(directory, change):
    body = read_manifest(directory).model_dump(mode="json")
    change(body)
    return body


def first_group(body):
    return body["shards"][0]["row_groups"][0]


NUMBERS = {
    "10^18 rows": lambda body: first_group(body).update(rows=10**18),
    "negative rows": lambda body: first_group(body).update(rows=-1),
    "offset 2^80": lambda body: first_group(body).update(byte_offset=2**80),
    "bytes past the file": lambda body: first_group(body).update(bytes=10**12),
    "a checksum of 2^40": lambda body: first_group(body).update(crc32=2**40),
    "a float of rows": lambda body: first_group(body).update(rows=1.0),
    "sequence_len 0": lambda body: body.update(sequence_len=0),
    "vocabulary of 2^40": lambda body: body["tokenizer"].update(vocabulary_size=2**40),
    "a special token of 2^40": lambda body: body["tokenizer"].update(special_tokens={"eos": 2**40}),
    "rows that do not add up": lambda body: body["shards"][0].update(rows=1),
    "a file twice": lambda body: body["shards"].append(body["shards"][0]),
    "documents of 2^70": lambda body: body["sources"][0].update(documents=2**70),
    "terminal codes": lambda body: body.update(packing="\x1b[2J"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_manifest_with_numbers_that_cannot_be_is_refused_in_one_line(shards, case):
    import json

    from headrace.schemas.fingerprint import fingerprint

    body = changed(shards, NUMBERS[case])
    body["manifest_sha256"] = fingerprint(body)
    with pytest.raises(DataError) as caught:
        parse_manifest(json.dumps(body).encode(), "manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"format":"headrace-shards","x":"\\ud800"}', "9" * 5000, '"\\u0000"', "{"],
)
def test_json_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(DataError, match=r"manifest\.json: "):
        parse_manifest(text.encode(), "manifest.json")


@pytest.mark.parametrize("name", ["../x.parquet", "/etc/passwd", "a/../../x", "", "a\n", "~/x"])
def test_a_shard_outside_of_its_directory_is_refused(shards, name):
    body = changed(shards, lambda body: body["shards"][0].update(file=name))
    with pytest.raises(ValueError, match="file"):
        Manifest.model_validate(body)


def test_a_link_that_leaves_the_directory_is_refused(shards, tmp_path):
    path = shards / read_manifest(shards).shards[0].file
    outside = path.rename(tmp_path / "outside.parquet")
    path.symlink_to(outside)
    with pytest.raises(DataError, match="a symbolic link that leaves its directory"):
        read_manifest(shards)


def test_links_of_a_hub_cache_are_followed(shards, tmp_path):
    cache = tmp_path / "datasets--a--b"
    snapshot = shutil.move(shards, cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    path = snapshot / read_manifest(snapshot).shards[0].file
    path.rename(cache / "blobs" / "123")
    path.symlink_to("../../blobs/123")
    assert read_first(snapshot).num_rows


def test_a_fifo_in_place_of_a_file_is_named_and_not_waited_for(shards):
    path = shards / read_manifest(shards).split("train")[0].file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"not a regular file"):
        read_first(shards)
    (shards / "manifest.json").unlink()
    os.mkfifo(shards / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json: not a regular file"):
        read_manifest(shards)
