"""Tables, nested fields, token ids, and records too large to hold: all kinds of files."""

import bz2
import csv
import gzip
import json
import lzma
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.dataprep.input import streams
from headrace.dataprep.input.json_scan import scan_json
from headrace.dataprep.input.json_shape import Shape, find_shape
from headrace.dataprep.input.records import find_field
from headrace.dataprep.input.streams import line_of, split_range
from headrace.schemas.errors import DataError

TEXTS = [f'stone {n}, "mill"\nwheel\té {"turns " * (n % 9)}' for n in range(120)]
WIDE = {"sequence_len": 1 << 15, "evaluation_fraction": 0.0}


def documents(path, **more):
    return [{"name": "a", "type": "documents", "path": path, **more}]


def write_arrow(path, table, new=pa.ipc.new_stream, rows=7):
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_csv(path, delimiter=",", ending="\n"):
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter, lineterminator=ending)
        rows.writerow(["n", "text"])
        rows.writerows(enumerate(TEXTS))


TABLE = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
KINDS = {
    "stream.arrow": lambda path: write_arrow(path, TABLE),
    "file.arrow": lambda path: write_arrow(path, TABLE, pa.ipc.new_file),
    "a.csv": write_csv,
    "dos.csv": lambda path: write_csv(path, ending="\r\n"),
    "a.tsv": lambda path: write_csv(path, delimiter="\t"),
    "b.tsv.gz": lambda path: (
        write_csv("plain.tsv", delimiter="\t"),
        pa.output_stream(path, compression="gzip").write(Path("plain.tsv").read_bytes()),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_documents_come_out_of_every_kind_of_table(
    name, corpus, make_config, run, documents_of, snapshot
):
    KINDS[name](name)
    manifest = run(make_config(sources=documents(name), **WIDE))
    assert documents_of("out") == sorted(TEXTS)
    assert manifest.sources[0].documents == len(TEXTS)
    run(make_config("two", sources=documents(name), **WIDE), workers=2)
    assert snapshot("two") == snapshot("out")


def test_the_config_may_say_what_is_in_a_file(corpus, make_config, run, documents_of):
    write_csv("table.data")
    run(make_config(sources=documents("table.data", format="csv"), **WIDE))
    assert documents_of("out") == sorted(TEXTS)


def test_a_table_may_have_another_delimiter(corpus, make_config, run, documents_of):
    write_csv("table.csv", delimiter=";")
    run(make_config(sources=documents("table.csv", delimiter=";"), block_bytes=4096, **WIDE))
    assert documents_of("out") == sorted(TEXTS)


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_delimiter_is_found_in_the_first_rows(
    name, delimiter, corpus, make_config, run, documents_of
):
    write_csv("table.csv", delimiter=delimiter)
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(Path("table.csv").read_bytes()))
    run(make_config(sources=documents(name), block_bytes=4096, **WIDE))
    assert documents_of("out") == sorted(TEXTS)


@pytest.mark.parametrize("content", ["n;text\n1;2;3\n", "n;te|xt\n1;a|b\n"])
def test_a_delimiter_that_rows_do_not_agree_on_is_asked_for(content, corpus, make_config, run):
    Path("table.csv").write_text(content)
    with pytest.raises(DataError, match=r"^table\.csv:1: the first row is one field, .* set delim"):
        run(make_config(sources=documents("table.csv"), **WIDE))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_of_a_table_are_read_as_utf_8(kind, corpus, make_config, run, documents_of):
    column = pa.array([text.encode() for text in TEXTS] + [b"\xff"], kind)
    write_arrow("in.arrow", pa.table({"text": column}))
    manifest = run(make_config(sources=documents("in.arrow"), max_reject_fraction=0.1, **WIDE))
    assert documents_of("out") == sorted(TEXTS)
    assert manifest.sources[0].rejected_documents == 1


SPREAD = "".join(json.dumps({"n": [{}], "text": text}, indent=1) + "\n" for text in TEXTS)
RECORDS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
AROUND = {"version": "[{1.0", "data": RECORDS, "more": {"data": [{"text": "no"}]}}
SHAPES = {
    "objects over lines": SPREAD,
    "objects over lines without ends between": SPREAD.replace("}\n{", "}{"),
    "one object over lines": json.dumps({"text": TEXTS[0]}, indent=1),
    "a list in an object": json.dumps(AROUND),
    "a list in an object over lines": json.dumps(AROUND, indent=1),
    "a list in an object with a mark": "\ufeff \n" + json.dumps(AROUND, indent=2),
}


@pytest.mark.parametrize("shape", ["objects over lines", "a list in an object"])
def test_json_in_other_shapes_than_lines(shape, corpus, make_config, run, documents_of, snapshot):
    Path("in.jsonl").write_text(SHAPES[shape], encoding="utf-8")
    run(make_config(sources=documents("in.jsonl"), block_bytes=4096, **WIDE))
    assert documents_of("out") == sorted(TEXTS)
    run(make_config("two", sources=documents("in.jsonl"), block_bytes=4096, **WIDE), workers=2)
    assert snapshot("two") == snapshot("out")


@pytest.mark.parametrize("name", ["in.jsonl", "in.json.gz"])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_records_of_each_shape_are_found_from_any_of_them(shape, chunk, name, corpus):
    content = SHAPES[shape].encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = find_shape(name, frozenset(["text"]), chunk)
    spans = list(scan_json(name, found.format, found.start, 1 << 20, chunk))
    one = shape == "one object over lines"
    assert [json.loads(span.data)["text"] for span in spans] == (TEXTS[:1] if one else TEXTS)
    middle = spans[len(spans) // 2]
    assert list(scan_json(name, found.format, middle.start, 1 << 20, chunk)) == [
        span for span in spans if span.start >= middle.start
    ]


def test_a_list_that_a_row_s_own_field_holds_is_no_list_of_rows(corpus, tmp_path):
    chat = {"id": 1, "messages": [{"role": "user", "content": "a"}]}
    Path("chat.json").write_text(json.dumps(chat, indent=1))
    assert find_shape("chat.json", frozenset(["messages", "tools"])) == Shape("objects")
    assert find_shape("chat.json", frozenset(["text"])).format == "inside"
    Path("chat.json").write_text(json.dumps(chat) + "\n" + json.dumps(chat))
    assert find_shape("chat.json", frozenset(["text"])) == Shape("jsonl")
    long = {"notes": [{"a": "x" * 100_000}], "text": "a"}
    Path("long.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(long))
    assert find_shape("long.jsonl", frozenset(["other"])) == Shape("jsonl")


def test_one_conversation_alone_in_its_file_is_a_record_whoever_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    Path("chat.json").write_text(json.dumps({"conversations": turns, "id": 1}))
    assert find_shape("chat.json", None) == Shape("jsonl")
    Path("rows.json").write_text(json.dumps({"data": [{"conversations": turns}]}))
    assert find_shape("rows.json", None).format == "inside"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{\n "text": "a"\n}\n{\n "text": "b"\n',
            r"^in\.json:4: the file ends in the record",
        ),
        (
            '{\n "text": "a"\n}\nword {}',
            r"^in\.json:4: Expecting '\{'; repair the JSON list",
        ),
        ('{"data": [\n{"text": "a"},\n{"text": "b"', r"^in\.json:1: the file ends in the record"),
    ],
)
def test_json_over_lines_that_is_cut_short_stops_the_run(
    content, message, corpus, make_config, run
):
    Path("in.json").write_text(content)
    with pytest.raises(DataError, match=message):
        run(make_config(sources=documents("in.json"), **WIDE))


def test_a_broken_object_over_lines_is_refused_alone(corpus, make_config, run, documents_of):
    Path("in.json").write_text('{\n "text": "a"\n}\n{\n "text": oh\n}\n{\n "text": "b"\n}\n')
    manifest = run(make_config(sources=documents("in.json"), max_reject_fraction=0.5, **WIDE))
    assert documents_of("out") == ["a", "b"]
    assert manifest.sources[0].rejected_documents == 1


def test_a_first_line_cut_short_is_refused_alone(corpus, make_config, run, documents_of):
    Path("in.jsonl").write_text('{"text": ["a",\n{"text": "b"}\n')
    run(make_config(sources=documents("in.jsonl"), max_reject_fraction=1.0, **WIDE))
    assert documents_of("out") == ["b"]


def test_a_folder_of_saved_datasets_is_read_in_the_order_of_its_files(
    corpus, make_config, run, documents_of
):
    Path("saved").mkdir()
    for number in range(3):
        part = TABLE.slice(40 * number, 40)
        write_arrow(f"saved/data-{number:05d}-of-00003.arrow", part)
    Path("saved/state.json").write_text("{}")
    run(make_config(sources=documents("saved"), **WIDE))
    assert documents_of("out") == sorted(TEXTS)


NESTED = [{"meta": {"parts": [{"body": text}, {"body": "x"}]}, "n": 1} for text in TEXTS]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow"])
def test_a_text_may_lie_in_nested_fields(name, corpus, make_config, run, documents_of):
    table = pa.Table.from_pylist(NESTED)
    if name == "in.jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    elif name == "in.parquet":
        pq.write_table(table, name, row_group_size=11)
    else:
        write_arrow(name, table)
    run(make_config(sources=documents(name, text_field="meta.parts.0.body"), **WIDE))
    assert documents_of("out") == sorted(TEXTS)


def test_a_field_of_a_dotted_name_goes_before_a_nested_one():
    assert find_field({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    for path in ("a.c", "a.0", "b", "a.b.c"):
        with pytest.raises(LookupError):
            find_field({"a": {"b": 2}}, path)


@settings(deadline=None, max_examples=120)
@given(
    records=st.lists(st.text("abx\n", max_size=30).map(str.encode), max_size=12),
    separator=st.sampled_from([b"|", b"||", b"|x|"]),
    limit=st.integers(1, 20),
    chunk=st.integers(1, 7),
    cut=st.integers(0, 100),
)
def test_a_record_that_is_too_large_leaves_its_neighbors_alone(
    records, separator, limit, chunk, cut, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "large.txt"
    content = separator.join(records)
    path.write_bytes(content)
    whole = content.split(separator)
    lines = [
        content.count(b"\n", 0, len(separator.join(whole[:n]) + separator) if n else 0)
        for n in range(len(whole))
    ]
    expected = [
        (line + 1, None if len(r) > limit else r) for line, r in zip(lines, whole, strict=True)
    ]
    expected = expected if whole[-1] else expected[:-1]
    cut = min(cut, len(content))
    ranges = [(0, cut), (cut, None)] if cut else [(0, None)]
    found = [
        (line_of(place), data)
        for start, end in ranges
        for place, data in split_range(str(path), separator, start, end, limit, chunk_bytes=chunk)
    ]
    streams.lines_before.cache_clear()  # the next example has the same path
    assert found == expected


LARGE = {"max_record_bytes": 1 << 16, "max_reject_fraction": 1.0, **WIDE}


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.parquet", "in.csv"])
def test_a_large_record_is_refused_in_every_kind_of_file(
    name, corpus, make_config, run, documents_of
):
    texts = [*TEXTS[:20], "x" * (1 << 17), *TEXTS[20:]]
    if name == "in.parquet":
        pq.write_table(pa.table({"text": texts}), name)
    elif name == "in.jsonl":
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif name == "in.json":
        Path(name).write_text(json.dumps([{"text": text} for text in texts], indent=1))
    else:
        with Path(name).open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text.replace("\n", " ")] for text in texts)])
    run(make_config(sources=documents(name), **LARGE))
    texts = [text.replace("\n", " ") for text in TEXTS] if name == "in.csv" else TEXTS
    assert documents_of("out") == sorted(texts)
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (22 if name == "in.csv" else 21, "too large")
    assert reject["detail"] == "more than max_record_bytes = 65536"


def test_a_text_file_that_is_too_large_is_refused(corpus, make_config, run):
    (corpus / "big.txt").write_text("x" * (1 << 17))
    manifest = run(make_config(**LARGE))
    assert manifest.sources[0].rejected_documents == 1
    assert manifest.sources[0].documents == 200


IDS = [[5, 6, 7, 8], [9, 10, 11], [12]]
ROWS = [
    {"input_ids": IDS[0], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    {"input_ids": [*IDS[1], 1], "labels": [*IDS[1], -100], "attention_mask": [1, 1, 1, 0]},
    {"input_ids": IDS[2], "labels": None, "attention_mask": None},
]


def pretokenized(path):
    return [{"name": "ids", "type": "pretokenized", "path": path}]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow"])
def test_token_ids_are_taken_as_they_are(name, corpus, make_config, run, rows_of):
    table = pa.Table.from_pylist(ROWS)
    if name == "in.jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif name == "in.parquet":
        pq.write_table(table, name)
    else:
        write_arrow(name, table, rows=2)
    changes = {"packing": "none", "evaluation_fraction": 0.0, "sources": pretokenized(name)}
    manifest = run(make_config(**changes))
    found = sorted((row["input_ids"], row["loss_mask"]) for row in rows_of("out"))
    assert found == [(IDS[0], [False, False, True, True]), (IDS[1], None), (IDS[2], None)]
    assert manifest.ledger.tokens_dropped == {"padding": 1}
    assert manifest.sources[0].trained_tokens == 6


BAD_IDS = {
    "an id that is none": (
        {"input_ids": [5, 320]},
        "id outside the vocabulary: 320 at token 1, the tokenizer has 311",
    ),
    "a negative id": (
        {"input_ids": [-1]},
        "id outside the vocabulary: -1 at token 0, the tokenizer has 311",
    ),
    "another label": (
        {"input_ids": [5, 6], "labels": [5, 7]},
        "labels differ from ids: label 7 at token 1, whose id is 6",
    ),
    "too few labels": ({"input_ids": [5, 6], "labels": [5]}, "lengths differ: 2 ids, 1 in labels"),
    "texts": (
        {"input_ids": ["a"]},
        'not a list of integers: field "input_ids" is a list, not a list of integers',
    ),
    "lists of lists": (
        {"input_ids": [[1], [2, 3]]},
        'not a list of integers: field "input_ids" is a list, not a list of integers',
    ),
    "no ids": ({"input_ids": []}, "empty document: no ids"),
    "nothing": (
        {"labels": [1], "body": "a"},
        'missing field: no field "input_ids"; the record has "labels", "body"',
    ),
    "a pair": (
        {"input_ids": [5], "rejected_input_ids": [6]},
        'a pair: field "rejected_input_ids" is there; pairs are no rows of one answer',
    ),
    "another class": (
        {"input_ids": [5], "control_class": 1},
        "control_class differs: it is 1, control_class of the source None",
    ),
    "documents that do not fit": (
        {"input_ids": [5, 6], "document_lengths": [1, 2]},
        "documents do not fit: document_lengths do not sum to the 2 ids",
    ),
    "documents that do not rise": (
        {"input_ids": [5, 6, 7], "cu_seqlens": [0, 2, 1]},
        "documents do not fit: cu_seqlens do not rise from 0 to the 3 ids",
    ),
    "numbered documents": (
        {"input_ids": [5, 6], "attention_mask": [1, 2]},
        "documents are not told: attention_mask is 2 at token 1, neither 0 nor 1; "
        "give document_lengths",
    ),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_rows_of_ids_that_cannot_be_are_refused(name, corpus, make_config, run):
    row, problem = BAD_IDS[name]
    Path("in.jsonl").write_text(f"{json.dumps(ROWS[2])}\n{json.dumps(row)}\n")
    run(make_config(sources=pretokenized("in.jsonl"), max_reject_fraction=1.0))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], f"{reject['reason']}: {reject['detail']}") == (2, problem)


def test_rows_of_which_nothing_is_trained_are_dropped_by_name(corpus, make_config, run):
    row = {"input_ids": [5, 6], "labels": [-100, -100], "attention_mask": [1, 0]}
    Path("in.jsonl").write_text(f"{json.dumps(ROWS[2])}\n{json.dumps(row)}\n")
    manifest = run(make_config(sources=pretokenized("in.jsonl"), evaluation_fraction=0.0))
    assert manifest.ledger.tokens_dropped == {"nothing in it is trained": 1, "padding": 1}
    assert manifest.sources[0].dropped_documents == {"nothing in it is trained": 1}


def test_what_was_prepared_can_be_prepared_again(corpus, make_config, run, rows_of):
    """Ids of a finished directory, as another source of the same rows."""
    run(make_config(evaluation_fraction=0.0, packing="none", overlong="split"))
    changes = {"evaluation_fraction": 0.0, "packing": "none", "overlong": "split"}
    run(make_config("again", sources=pretokenized("out/shard-*.parquet"), **changes))
    first, again = (sorted(row["input_ids"] for row in rows_of(name)) for name in ("out", "again"))
    assert first == again


def test_half_a_file_of_arrow_is_named(corpus, make_config, run):
    write_arrow("in.arrow", TABLE)
    Path("in.arrow").write_bytes(Path("in.arrow").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"^in\.arrow: (not readable as|damaged) Arrow \("):
        run(make_config(sources=documents("in.arrow"), **WIDE))


@pytest.mark.parametrize(
    "told",
    [
        {"document_lengths": [2, 3]},
        {"seq_lengths": [2, 3]},
        {"cu_seqlens": [0, 2, 5]},
        {"cu_seqlens": [0, 2, 4]},
        {"position_ids": [0, 1, 0, 1, 2]},
    ],
    ids=str,
)
def test_a_packed_row_of_ids_becomes_its_documents_again(told, corpus, make_config, run, rows_of):
    row = {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 0, 1, 1], **told}
    Path("in.jsonl").write_text(json.dumps(row) + "\n")
    run(make_config(sources=pretokenized("in.jsonl"), evaluation_fraction=0.0))
    (row,) = rows_of("out")
    assert row["document_lengths"] == [2, 3]
    assert row["input_ids"] == [5, 6, 7, 8, 9]
    assert row["loss_mask"] == [False, True, False, True, True]


def test_the_rows_of_another_run_keep_their_documents(corpus, make_config, run, rows_of):
    texts = [{"text": f"stone {number} mill"} for number in range(9)]
    Path("in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    sources = [{"name": "mill", "type": "documents", "path": "in.jsonl"}]
    run(make_config(sources=sources, evaluation_fraction=0.0, packing="best_fit"))
    lengths = sorted(n for row in rows_of("out") for n in row["document_lengths"])
    run(
        make_config(
            output="again",
            sources=pretokenized("out/shard-*.parquet"),
            evaluation_fraction=0.0,
            packing="best_fit",
        )
    )
    assert len(lengths) == 9
    assert sorted(n for row in rows_of("again") for n in row["document_lengths"]) == lengths


def test_a_byte_order_mark_is_in_no_document(corpus, make_config, run, documents_of):
    mark = b"\xef\xbb\xbf"
    Path("a.md").write_bytes(mark + b"# Title")
    Path("b.md").write_bytes(mark + b"one--two")
    sources = [
        {"name": "whole", "type": "text", "path": "a.md"},
        {"name": "cut", "type": "text", "path": "b.md", "document_separator": "--"},
    ]
    run(make_config(sources=sources, evaluation_fraction=0.0, packing="best_fit"))
    assert documents_of("out") == ["# Title", "one", "two"]


@pytest.mark.parametrize(
    ("name", "pack"), [("in.jsonl.bz2", bz2.compress), ("in.jsonl.xz", lzma.compress)]
)
def test_further_compressions_are_read_and_damage_is_named(
    name, pack, corpus, make_config, run, documents_of
):
    Path(name).write_bytes(pack(b'{"text": "stone"}\n{"text": "mill"}\n'))
    sources = [{"name": "mill", "type": "documents", "path": name}]
    run(make_config(sources=sources, evaluation_fraction=0.0))
    assert documents_of("out") == ["mill", "stone"]
    Path(name).write_bytes(Path(name).read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^{name}: cannot be read to its end"):
        run(make_config(output="cut", sources=sources, evaluation_fraction=0.0))


def test_no_more_is_read_than_a_range_holds_and_blank_lines_cost_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"word " * 2_000_000 + b'"}\n')
    assert streams.first_record(str(path), b"\n", 3_000_000, 4_000_000) < 6_000_000
    assert list(split_range(str(path), b"\n", 3_000_000, 4_000_000, 1000)) == []
    path.write_bytes(b"\n" * 30_000_000 + b"{}\n")
    start = time.process_time()
    found = list(split_range(str(path), b"\n", 0, None, 1000, blanks=False))
    assert [(place.line, data) for place, data in found] == [(30_000_000, b"{}")]
    assert time.process_time() - start < 2
