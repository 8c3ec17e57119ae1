"""A small Parquet file that unpacks to a very large one is refused before it is decoded."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.input.files import InputFile
from headrace.dataprep.input.pieces import Piece
from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.input.row_sizes import row_bytes
from headrace.dataprep.input.table_records import read_arrow, read_parquet
from headrace.dataprep.input.tasks import batch_sizes, row_group_sizes
from headrace.schemas.errors import DataError

COLUMNS = {
    "text": pa.array(["z" * 3_000_000]),
    "input_ids": pa.array([np.zeros(700_000, np.int32)]),
}


@pytest.mark.parametrize(("name", "kind"), [("text", "documents"), ("input_ids", "pretokenized")])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_bomb_is_refused_with_its_sizes(name, kind, dictionary, corpus, make_config):
    table = pa.table({name: COLUMNS[name]})
    pq.write_table(table, "in.parquet", compression="zstd", use_dictionary=dictionary)
    sources = [{"name": "mill", "type": kind, "path": "in.parquet"}]
    with pytest.raises(
        DataError, match=rf"^in\.parquet: row group 0: column {name}.* unpacks from"
    ):
        row_group_sizes(make_config(sources=sources).sources[0], "in.parquet", {name}, 1 << 20)


def bomb_of_dictionary(rows):
    """A text of a megabyte that many rows have, once in a dictionary."""
    return pa.array(["z" * 1_000_000] * rows)


def write_parquet(path, column, **options):
    pq.write_table(pa.table({"text": column}), path, compression="zstd", **options)


def write_arrow(path, column, compression="zstd"):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    table = pa.table({"text": column})
    with pa.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table)


def write_stream(path, column):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    table = pa.table({"text": column})
    with pa.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table)


DOCUMENT = bomb_of_dictionary(40)
SHARED = pa.DictionaryArray.from_arrays(np.zeros(5000, np.int32), ["z" * 10_000])
CHAT = pa.array([[{"role": "user", "content": "z" * 1_000_000}] * 40])
BOMBS = {
    "a dictionary": (lambda: write_parquet("in.parquet", DOCUMENT), "unpack from .* to more than"),
    "differences": (
        lambda: write_parquet(
            "in.parquet",
            DOCUMENT,
            use_dictionary=False,
            column_encoding={"text": "DELTA_BYTE_ARRAY"},
        ),
        "unpack from .* to more than",
    ),
    "an Arrow file": (lambda: write_arrow("in.arrow", DOCUMENT), "message 0 unpacks from"),
    "an Arrow stream": (lambda: write_stream("in.arrow", DOCUMENT), "message 1 unpacks from"),
    "a dictionary of an Arrow file": (
        lambda: write_arrow("in.arrow", SHARED, None),
        "unpack from .* to more than",
    ),
}


def read_file(source, path, large):
    """Every record of a file, as a run reads it: its parts are planned before one is unpacked."""
    kind, columns = Path(path).suffix[1:], frozenset(["text"])
    find, read = {
        "parquet": (row_group_sizes, read_parquet),
        "arrow": (batch_sizes, read_arrow),
    }[kind]
    sizes = find(source, path, columns, large)
    piece = Piece(InputFile(path, 1, 0), kind, 0, len(sizes), 1)
    return list(read(piece, columns, False, 1 << 26, large))


@pytest.mark.parametrize("name", BOMBS)
def test_texts_that_a_file_keeps_once_are_refused_with_their_sizes(name, corpus, make_config):
    write, message = BOMBS[name]
    write()
    sources = [{"name": "mill", "type": "documents", "path": "in.*"}]
    (path,) = map(str, Path().glob("in.*"))
    with pytest.raises(DataError, match=rf"^in\.\w+: .*{message}"):
        read_file(make_config(sources=sources).sources[0], path, 1 << 21)


def test_messages_in_a_dictionary_are_never_made_at_once(corpus):
    pq.write_table(pa.table({"messages": CHAT}), "in.parquet", compression="zstd")
    piece = Piece(InputFile("in.parquet", 1, 0), "parquet", 0, 1, 1)
    with pytest.raises(DataError, match=r"^in\.parquet: .*unpack from .* to more than 40000"):
        list(read_parquet(piece, frozenset(["messages"]), False, 1 << 26, 1 << 21))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_above_the_limit_is_refused_and_the_others_come(kind, corpus):
    texts = ["short", "z" * 5_000_000, "last"]
    write = {"parquet": write_parquet, "arrow": write_arrow}[kind]
    write(f"in.{kind}", pa.array(texts))
    piece = Piece(InputFile(f"in.{kind}", 1, 0), kind, 0, 1, 1)
    read = {"parquet": read_parquet, "arrow": read_arrow}[kind]
    found = list(read(piece, frozenset(["text"]), False, 1 << 20))
    assert [type(item) for item in found] == [Record, Reject, Record]
    assert (found[1].line, found[1].reason) == (2, "too large")


def test_large_dictionaries_of_honest_files_are_read_as_they_are(corpus):
    texts = [f"{number} " * 300 for number in range(600)]
    chats = [[{"role": "user", "content": text}, {"role": "x", "content": "a"}] for text in texts]
    table = pa.table({"text": texts, "chat": chats, "binary": pa.array(texts, pa.binary())})
    pq.write_table(table, "in.parquet", dictionary_pagesize_limit=1 << 20)
    piece = Piece(InputFile("in.parquet", 1, 0), "parquet", 0, 1, 1)
    found = read_parquet(piece, frozenset(table.column_names), False, 1 << 26, 1 << 16)
    rows = [{"text": t, "chat": c, "binary": t} for t, c in zip(texts, chats, strict=True)]
    assert [record.fields for record in found] == rows


def test_a_broken_arrow_file_ends_in_one_line(corpus, make_config, run):
    write_arrow("in.arrow", pa.array(["water wheel"] * 50), None)
    whole = bytearray(Path("in.arrow").read_bytes())
    sources = [{"name": "mill", "type": "documents", "path": "in.arrow"}]
    config = make_config(sources=sources)
    for place in range(0, len(whole), 29):
        broken = whole.copy()
        broken[place : place + 4] = b"\xff\xff\xff\x7f"
        Path("in.arrow").write_bytes(broken)
        with contextlib.suppress(DataError):
            list(read_arrow(Piece(InputFile("in.arrow", 1, 0), "arrow", 0, 1, 1), None, False, 99))
            batch_sizes(config.sources[0], "in.arrow", None)


def test_sizes_of_rows_are_those_of_their_values():
    values = ["a", None, "bcd" * 9]
    batch = pa.record_batch(
        {
            "text": values,
            "view": pa.array(values, pa.string_view()),
            "dictionary": pa.array(values).dictionary_encode(),
            "list": [[{"c": "aa"}], [], [{"c": "b"}, {"c": None}]],
            "map": pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
            "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
            "runs": pa.RunEndEncodedArray.from_arrays([2, 3], ["aaa", "b"]),
        }
    )
    texts = np.array([1, 0, 27])
    wanted = 3 * texts + [2, 0, 1] + [2, 0, 0] + 8 + [3, 3, 1]
    assert row_bytes(batch).tolist() == wanted.tolist()
    assert row_bytes(batch.slice(1)).tolist() == wanted[1:].tolist()
