"""Records of JSONL files and JSON lists."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from headrace.dataprep.input.json_scan import scan_json
from headrace.dataprep.input.json_shape import list_of_records
from headrace.dataprep.input.pieces import Columns, Piece
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.input.streams import decode, refuse, refuse_bytes, refuse_large, split_range
from headrace.schemas.outside_text import json_type

decode_object = json.JSONDecoder().raw_decode
MOST_NESTED = 100  # lists and objects in each other; what follows is recursive


class Wanted(NamedTuple):
    """Selection from parsed JSON: fields (None: all), and the field for a row that is a list."""

    columns: Columns
    list_field: str | None = None


def read_lines(piece: Piece, wanted: Wanted, limit: int) -> Iterator[Record | Reject]:
    """JSONL: one object a line; lines of white space alone are no records."""
    path, start, end = piece.file.path, piece.start, piece.end
    for place, data in split_range(path, b"\n", start, end, limit, blanks=False):
        if data is None:
            yield refuse_large(place, limit)
        elif data.strip():
            text = decode(place, data)
            yield text if isinstance(text, Reject) else parse_line(text, place, wanted)


def parse_line(line: str, place: Place, wanted: Wanted) -> Record | Reject:
    """The record in one line of JSONL."""
    try:
        value = loads(line)
    except json.JSONDecodeError as error:
        return refuse(place, "broken JSON", f"column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return refuse(place, "broken JSON", str(error))
    return take_fields(value, place, wanted, line)


def loads(line: str) -> Any:
    """Return `json.loads` of a line, in less time where nothing is wrong with it."""
    try:
        value, end = decode_object(line)
    except json.JSONDecodeError:
        end = None  # `json.loads` tells what is wrong
    return value if end == len(line) else json.loads(line)


def read_json_list(piece: Piece, wanted: Wanted, limit: int) -> Iterator[Record | Reject]:
    """Objects of a JSON list, or over lines, each parsed on its own."""
    path = piece.file.path
    spans = scan_json(path, piece.format, piece.start, limit)
    for number, span in enumerate(spans, start=piece.first):
        if piece.end is not None and span.start >= piece.end:
            return
        place = Place(path, 0, number)
        yield refuse_large(place, limit) if span.data is None else parse(span.data, place, wanted)


def parse(data: bytes, place: Place, wanted: Wanted) -> Record | Reject:
    """The record in one value of a list."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return refuse_bytes(place, error)
    return parse_line(text, place, wanted)


def take_fields(value: object, place: Place, wanted: Wanted, line: str) -> Record | Reject:
    """The wanted fields of one object, parsed from a line."""
    if isinstance(value, list) and wanted.list_field is not None:
        value = {wanted.list_field: value}
    if not isinstance(value, dict):
        return refuse(place, "not an object", f"the record is {json_type(value)}")
    names = tuple(value)
    if wanted.columns is not None:
        found = {name: field for name, field in value.items() if name in wanted.columns}
        if not found and (name := list_of_records(value)):
            detail = (
                f"field {name} is a list of records; write each as a line: `jq -c '.[{name}][]'`"
            )
            return refuse(place, "a list in an object", detail)
        value = found
    problem = find_problem(value) if is_suspect(value, line) else None
    return refuse(place, *problem) if problem else Record(value, place, names)


def is_suspect(value: dict[str, Any], line: str) -> bool:
    """Return whether there may be half a surrogate pair in an object, or deep nesting.

    Its line, which is Unicode, is searched only where that tells more than the fields do: it
    costs half of parsing.
    """
    plain = True
    for name, field in value.items():
        kind = type(field)
        if kind is list or kind is dict:
            return "\\u" in line or line.count("[") + line.count("{") > MOST_NESTED
        plain = plain and name.isascii() and (kind is not str or field.isascii())
    return not plain and "\\u" in line


def find_problem(value: object, depth: int = 0) -> tuple[str, str] | None:
    """Why a JSON value cannot be used: a string that is no Unicode text, deep nesting; or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = f"lone surrogate {value[error.start]!r} at character {error.start}"
            return "invalid UTF-8", where
    children: list[Any] = value if isinstance(value, list) else []
    if isinstance(value, dict):
        children = [*value, *value.values()]
    if children and depth == MOST_NESTED:
        return "broken JSON", f"nested more than {MOST_NESTED} deep"
    found = (find_problem(child, depth + 1) for child in children)
    return next((problem for problem in found if problem), None)
