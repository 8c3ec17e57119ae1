"""Records of one piece of input, each on its own: a bad one leaves its neighbours alone."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.streams import Place, read_all, split_range
from headrace.dataprep.tasks import Columns, Piece
from headrace.schemas.errors import DataError
from headrace.schemas.prepare_config import SourceConfig

PARQUET_BATCH_ROWS = 256
LIST_FIELDS = {"chat": "messages"}  # a row may be the list of messages itself


class Record(NamedTuple):
    """One parsed row, and where it begins. A piece of a text file is {text_field: text}."""

    fields: dict[str, Any]
    place: Place


class Reject(NamedTuple):
    """One refused record. `line` counts from 1; in JSON lists and Parquet it is the record."""

    file: str
    line: int
    reason: str
    detail: str


class Wanted(NamedTuple):
    """What is taken of parsed JSON: fields (None: all), and where a row that is a list belongs."""

    columns: Columns
    list_field: str | None = None


def read_records(source: SourceConfig, piece: Piece, columns: Columns) -> Iterator[Record | Reject]:
    """The records of a piece in file order, and in their places those that were refused.

    Args:
        columns: the fields to read; None: all.
    """
    match piece.format:
        case "text":
            return read_text(source, piece)
        case "lines":
            return read_lines(piece, Wanted(columns, LIST_FIELDS.get(source.type)))
        case "json":
            return read_json_list(piece, Wanted(columns, LIST_FIELDS.get(source.type)))
        case "parquet":
            return read_parquet(piece, columns)


def read_text(source: SourceConfig, piece: Piece) -> Iterator[Record | Reject]:
    """A text file as one record, or cut at the separator."""
    path = piece.file.path
    if source.document_separator is None:
        pieces = iter([(Place(path, 0, 0), read_all(path))])
    else:
        separator = source.document_separator.encode()
        pieces = split_range(path, separator, piece.start, piece.end)
    for place, data in pieces:
        text = decode(place, data)
        yield text if isinstance(text, Reject) else Record({source.text_field: text}, place)


def read_lines(piece: Piece, wanted: Wanted) -> Iterator[Record | Reject]:
    """JSONL: one object a line; lines of white space alone are no records."""
    first = piece.start == 0
    for place, data in split_range(piece.file.path, b"\n", piece.start, piece.end):
        line = data.removeprefix(codecs.BOM_UTF8) if first else data
        first = False
        if line.strip():
            text = decode(place, line)
            yield text if isinstance(text, Reject) else parse_line(text, place, wanted)


def parse_line(line: str, place: Place, wanted: Wanted) -> Record | Reject:
    """The record in one line of JSONL."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return refuse(place, "broken JSON", f"column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return refuse(place, "broken JSON", str(error))
    return take_fields(value, place, wanted, escaped="\\u" in line)


def read_json_list(piece: Piece, wanted: Wanted) -> Iterator[Record | Reject]:
    """A JSON list of objects; the file is parsed whole."""
    path = piece.file.path
    try:
        records = json.loads(read_all(path).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}: column {error.colno}"
        raise DataError(f"{where}: {error.msg}; repair the JSON list, or write JSONL") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be parsed ({error}); repair it, or write JSONL") from None
    for number, record in enumerate(records):
        yield take_fields(record, Place(path, 0, number), wanted, escaped=True)


def take_fields(value: object, place: Place, wanted: Wanted, escaped: bool) -> Record | Reject:
    """The wanted fields of one parsed object.

    Args:
        escaped: whether the JSON has escapes, and so may hold half a surrogate pair.
    """
    if isinstance(value, list) and wanted.list_field is not None:
        value = {wanted.list_field: value}
    if not isinstance(value, dict):
        return refuse(place, "not an object", f"the record is {json_type(value)}")
    if wanted.columns is not None:
        value = {name: field for name, field in value.items() if name in wanted.columns}
    problem = find_surrogate(value) if escaped else None
    return refuse(place, "invalid UTF-8", problem) if problem else Record(value, place)


def find_surrogate(value: object) -> str | None:
    """Where a string in a JSON value is no Unicode text, or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"lone surrogate {value[error.start]!r} at character {error.start}"
    children = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else ()
    )
    return next((problem for child in children if (problem := find_surrogate(child))), None)


def read_parquet(piece: Piece, columns: Columns) -> Iterator[Record | Reject]:
    """Some row groups; of the columns, those that are there."""
    path = piece.file.path
    with pq.ParquetFile(path) as file:
        groups = list(range(piece.start, piece.end or 0))
        number = sum(file.metadata.row_group(index).num_rows for index in range(piece.start))
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        batches = file.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=names)
        try:
            for batch in batches:
                yield from batch_records(batch, path, number)
                number += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{path}: damaged Parquet ({reason}); replace the file") from None


def batch_records(batch: pa.RecordBatch, path: str, number: int) -> Iterator[Record | Reject]:
    """The rows of an Arrow batch, the first of which is record `number` of the file, from 0."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        yield from careful_records(batch, path, number)
        return
    for index, fields in enumerate(rows):
        yield Record(fields, Place(path, 0, number + index))


def careful_records(batch: pa.RecordBatch, path: str, number: int) -> Iterator[Record | Reject]:
    """The same row by row: invalid UTF-8 concerns one record only."""
    for index in range(batch.num_rows):
        place = Place(path, 0, number + index)
        try:
            (fields,) = batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield refuse_bytes(place, error)
        else:
            yield Record(fields, place)


def decode(place: Place, data: bytes) -> str | Reject:
    """Strict UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return refuse_bytes(place, error, data.count(b"\n", 0, error.start))


def refuse_bytes(place: Place, error: UnicodeDecodeError, further: int = 0) -> Reject:
    """A record that is no UTF-8."""
    detail = f"byte 0x{error.object[error.start]:02x} at byte {error.start} of the document"
    return refuse(place, "invalid UTF-8", detail, further)


def refuse(place: Place, reason: str, detail: str, further: int = 0) -> Reject:
    """A reject at a place, `further` lines down."""
    return Reject(place.file, place.number(further), reason, detail)


def characters(value: object) -> int:
    """The size of a record: characters in its strings, and 4 for each number."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    if isinstance(value, list):
        return sum(map(characters, value))
    return 4 if isinstance(value, int | float) else 0


def json_type(value: object) -> str:
    """A value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
