"""CSV files and JSON lists: cut among workers where records begin, each bad record on its own."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.dataprep.input import csv_scan
from headrace.dataprep.input.csv_records import parse_row, read_csv
from headrace.dataprep.input.csv_scan import scan_csv
from headrace.dataprep.input.json_records import Wanted, loads, read_json_list
from headrace.dataprep.input.json_scan import scan_json
from headrace.dataprep.input.pieces import InputFile, Piece
from headrace.dataprep.input.records import Record
from headrace.dataprep.input.streams import line_of
from headrace.dataprep.input.tasks import cut_file
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.source_config import SourceConfig


def piece(path):
    return Piece(InputFile(str(path), 0, 0), "csv", 0, None, 0)


def csv_records(path, text, limit=1000):
    path.write_bytes(text)
    return list(read_csv(piece(path), None, ",", limit))


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(CELLS | st.sampled_from(["a\n\nb", '"', ","]), min_size=2, max_size=2)),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_gives_back_every_cell_and_the_line_of_each_row(rows, quoting, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n", quoting=quoting)
    lines = []
    for row in [["first", "second"], *rows]:
        lines.append(sink.getvalue().count("\n") + 1)
        writer.writerow(row)
    found = csv_records(path, sink.getvalue().encode())
    assert [record.fields for record in found] == [
        {"first": first, "second": second} for first, second in rows
    ]
    assert [line_of(record.place) for record in found] == lines[1:]


def test_a_bad_row_of_a_csv_is_refused_by_its_line(tmp_path):
    text = b'a,b\n1,2\n\n"x\ny",3\n1,2,3\n4\xff,5\n"6"7,8\n9,10\n'
    found = csv_records(tmp_path / "a.csv", text)
    assert [r.fields for r in found if isinstance(r, Record)] == [
        {"a": "1", "b": "2"},
        {"a": "x\ny", "b": "3"},
        {"a": "9", "b": "10"},
    ]
    rejects = [(r.line, r.reason) for r in found if not isinstance(r, Record)]
    assert rejects == [
        (6, "wrong number of fields"),
        (7, "invalid UTF-8"),
        (8, "broken CSV"),
    ]


@pytest.mark.parametrize("rest", [b"4,5\n", b"4,5\n" * 1000], ids=["short", "long"])
def test_a_quote_that_is_never_closed_stops_the_run(rest, tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:3: a quote that is opened here is never closed"):
        csv_records(tmp_path / "a.csv", b'a,b\n1,2\n"3,4\n' + rest)


def rows_of_csv(lines):
    """What Python's reader makes of lines: rows, and None for each error; or None for all."""
    csv.field_size_limit(1 << 20)
    reader = csv.reader(iter(lines), strict=True)
    found = []
    while True:
        try:
            row = next(reader, "end")
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                return None
            found.append(None)
            continue
        if row == "end":
            return found
        found.append(row)


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(st.sampled_from('a",\r\n'), max_size=40),
    chunk=st.integers(1, 9),
    bom=st.booleans(),
)
def test_records_of_a_csv_end_where_python_ends_them(text, chunk, bom, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "scan.csv"
    data = text.encode()
    path.write_bytes(csv_scan.BOM * bom + data)
    expected = rows_of_csv(line.decode() for line in io.BytesIO(data))
    spans = list(scan_csv(str(path), ",", 0, 1000, chunk))
    short = list(scan_csv(str(path), ",", 0, 4, chunk))
    for span in spans:
        later = scan_csv(str(path), ",", span.start, 1000, chunk)
        assert [s.start for s in later] == [s.start for s in spans if s.start >= span.start]
    assert csv_scan.BOM * bom + b"".join(span.data for span in spans) == path.read_bytes()
    kept = [span.data if len(span.data) <= 4 else None for span in spans]
    assert [span[:2] for span in short] == [span[:2] for span in spans]
    assert [span.data for span in short] == kept
    if expected is None:
        assert spans[-1].open
        return
    found = []
    for span in spans:
        try:
            found.append(parse_row(span.data, ","))
        except csv.Error:
            found.append(None)
    assert found == expected


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        )
    ),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_a_json_list_is_read_value_by_value(values, chunk, indent, ascii_only, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "list.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf " + text.encode(errors="surrogatepass") + b" \n")
    spans = list(scan_json(str(path), "json", 0, 1 << 20, chunk))
    for span in spans:
        assert list(scan_json(str(path), "json", span.start, 1 << 20, chunk)) == [
            other for other in spans if other.start >= span.start
        ]
    found = [json.loads(span.data.decode(errors="surrogatepass")) for span in spans]
    assert found == values


BROKEN_LISTS = {
    "no list": ('{"a": 1}', r"a\.json:1: Expecting '\['"),
    "empty": ("  ", r"a\.json:1: Expecting '\['"),
    "no end": ("[1,\n\n", r"a\.json:1: the file ends in the record that begins here"),
    "an unfinished string": ('[1,\n "a', r":1: the file ends in the record that begins here"),
    "more after the end": ("[1]\n 2", r":2: Extra data '2'; repair the JSON list, or write JSONL"),
    "deep nesting": ("[" * 10_000, "the file ends in the record that begins here"),
}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_a_list_that_does_not_end_is_named_by_its_line(name, chunk, tmp_path):
    text, message = BROKEN_LISTS[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(scan_json(str(tmp_path / "a.json"), "json", 0, 1 << 20, chunk))


def nested(depth):
    """0 in so many objects."""
    return {"a": nested(depth - 1)} if depth else 0


def test_a_bad_value_of_a_json_list_is_refused_by_its_number(tmp_path):
    path = tmp_path / "a.json"
    values = [b'{"a": 1}', b'{"a": }', b"2", b'{"a": "\xff"}', b'{"a": "' + b"x" * 99 + b'"}']
    values += [
        b'{"a": 1} {"a": 2}',
        b"",
        b"[" * 5000 + b"]" * 5000,
        b'{"a": "\\ud800"}',
        b'{"a":3}',
        *(b'{"a":' * n + b"0" + b"}" * n for n in (100, 101, 700)),
    ]
    path.write_bytes(b"[" + b",\n ".join(values) + b"]")
    piece = Piece(InputFile(str(path), 0, 0), "json", 0, None, 0)
    found = list(read_json_list(piece, Wanted(None), 1 << 14))
    assert [r.fields for r in found if isinstance(r, Record)] == [
        {"a": 1},
        {"a": "x" * 99},
        {"a": 3},
        nested(100),
    ]
    reasons = [(r.line, r.reason) for r in found if not isinstance(r, Record)]
    assert reasons == [
        (2, "broken JSON"),
        (3, "not an object"),
        (4, "invalid UTF-8"),
        (6, "broken JSON"),
        (7, "broken JSON"),
        (8, "broken JSON"),
        (9, "invalid UTF-8"),
        (12, "broken JSON"),
        (13, "broken JSON"),
    ]
    large = list(read_json_list(piece, Wanted(None), 90))[4]
    assert (large.reason, large.detail) == ("too large", "more than max_record_bytes = 90")


TEXTS = [f'"stone" {n},\n[mill] {{wheel}} \\ é {"turns " * (n * 7 % 90)}' for n in range(400)]


def write_list(name):
    """A file of many records, one of which is refused."""
    with Path(name).open("w", newline="", encoding="utf-8") as file:
        if name == "in.json":
            bad = json.dumps([*({"text": text} for text in TEXTS[:300]), 7], ensure_ascii=False)
            rest = json.dumps([{"text": text} for text in TEXTS[300:]], indent=1)
            file.write(bad[:-1] + ", " + rest[1:])
        else:
            rows = csv.writer(file)
            rows.writerow(["text", "n"])
            rows.writerows((text, n) for n, text in enumerate(TEXTS[:300]))
            file.write("a,b,c\n")
            rows.writerows((text, n) for n, text in enumerate(TEXTS[300:]))


@pytest.mark.parametrize("name", ["in.csv", "in.json"])
def test_a_file_is_cut_among_workers(
    name, corpus, make_config, run, documents_of, snapshot, monkeypatch
):
    write_list(name)
    size = Path(name).stat().st_size
    source = SourceConfig(name="a", type="documents", path=name)
    file = InputFile(name, size, 0)
    pieces = list(cut_file(source, file, None, size // 7))
    assert [piece.end for piece in pieces] == [*(piece.start for piece in pieces[1:]), None]
    assert len(pieces) == 8
    assert all(piece.size < size // 5 for piece in pieces)
    changes = {"sequence_len": 4096, "evaluation_fraction": 0.0, "max_reject_fraction": 0.1}
    sources = [{"name": "a", "type": "documents", "path": name}]
    config = make_config("cut", sources=sources, block_bytes=2048, **changes)
    run(config)
    cut = snapshot("cut")
    assert documents_of("cut") == sorted(TEXTS)
    (reject,) = map(json.loads, Path("cut/rejects/rejects.jsonl").read_text().splitlines())
    line = 301 if name == "in.json" else 2 + sum(1 + text.count("\n") for text in TEXTS[:300])
    assert reject["line"] == line
    if name == "in.json":
        return  # processes take seconds to start
    run(make_config("two", sources=sources, block_bytes=2048, **changes), 2)
    assert snapshot("two") == cut


LINES = [
    '{"text": "a"}',
    ' {"text": "a"}',
    '{"text": "a"}\r',
    '{"text": "a"} \t',
    '{"text": "a"}{"text": "b"}',
    '{"text": "a"} x',
    '\ufeff{"text": "a"}',
    '{"text": NaN, "more": -Infinity}',
    '{"text": "\\ud800"}',
    '{"text": "a\tb"}',
    '{"text": ' + "9" * 5000 + "}",
    "[" * 100_000,
    '{"text"',
    "[1, 2]",
    "7",
    '"a',
    "",
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_are_parsed_as_the_standard_library_does(line):
    def outcome(parse):
        try:
            return repr(parse(line))
        except (ValueError, RecursionError) as error:
            return type(error), str(error)

    assert outcome(loads) == outcome(json.loads)
