"""Documents of one piece of input, each on its own: a bad one leaves its neighbours alone."""

import codecs
import json
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.streams import Place, read_all, split_range
from headrace.dataprep.tasks import Piece
from headrace.schemas.errors import DataError
from headrace.schemas.prepare_config import SourceConfig

PARQUET_BATCH_ROWS = 256


class Document(NamedTuple):
    """One text, and where it begins."""

    text: str
    place: Place


class Reject(NamedTuple):
    """One refused document. `line` counts from 1; in JSON lists and Parquet it is the record."""

    file: str
    line: int
    reason: str
    detail: str


def read_documents(source: SourceConfig, piece: Piece) -> Iterator[Document | Reject]:
    """The documents of a piece in file order, and in their places those that were refused."""
    match piece.format:
        case "text":
            return read_text(source, piece)
        case "lines":
            return read_lines(source, piece)
        case "json":
            return read_json_list(source, piece)
        case "parquet":
            return read_parquet(source, piece)


def read_text(source: SourceConfig, piece: Piece) -> Iterator[Document | Reject]:
    """A text file as one document, or cut at the separator."""
    path = piece.file.path
    if source.document_separator is None:
        yield decode(Place(path, 0, 0), read_all(path))
        return
    separator = source.document_separator.encode()
    for place, data in split_range(path, separator, piece.start, piece.end):
        yield decode(place, data)


def read_lines(source: SourceConfig, piece: Piece) -> Iterator[Document | Reject]:
    """JSONL: one object a line; lines of white space alone are no records."""
    first = piece.start == 0
    for place, data in split_range(piece.file.path, b"\n", piece.start, piece.end):
        record = data.removeprefix(codecs.BOM_UTF8) if first else data
        first = False
        if record.strip():
            line = decode(place, record)
            yield line if isinstance(line, Reject) else parse_line(source, line)


def parse_line(source: SourceConfig, line: Document) -> Document | Reject:
    """The document in one line of JSONL."""
    try:
        record = json.loads(line.text)
    except json.JSONDecodeError as error:
        return refuse(line.place, "broken JSON", f"column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return refuse(line.place, "broken JSON", str(error))
    return take_text(source, record, line.place)


def read_json_list(source: SourceConfig, piece: Piece) -> Iterator[Document | Reject]:
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
        yield take_text(source, record, Place(path, 0, number))


def read_parquet(source: SourceConfig, piece: Piece) -> Iterator[Document | Reject]:
    """The text column of some row groups."""
    path = piece.file.path
    with pq.ParquetFile(path) as file:
        groups = list(range(piece.start, piece.end or 0))
        number = sum(file.metadata.row_group(index).num_rows for index in range(piece.start))
        batches = file.iter_batches(
            PARQUET_BATCH_ROWS, row_groups=groups, columns=[source.text_field]
        )
        try:
            for batch in batches:
                for value in as_bytes(batch.column(0)):
                    place = Place(path, 0, number)
                    yield wrong_type(source, None, place) if value is None else decode(place, value)
                    number += 1
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{path}: damaged Parquet ({reason}); replace the file") from None


def as_bytes(column: pa.Array) -> Iterator[bytes | None]:
    """The raw values of a string column, so that invalid UTF-8 concerns one record only."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for value in column.cast(pa.large_binary()):
        yield value.as_py()


def take_text(source: SourceConfig, record: object, place: Place) -> Document | Reject:
    """The text field of one parsed record."""
    if not isinstance(record, dict):
        return refuse(place, "not an object", f"the record is {json_type(record)}")
    if source.text_field not in record:
        return refuse(place, "missing field", f'no field "{source.text_field}"')
    text = record[source.text_field]
    if not isinstance(text, str):
        return wrong_type(source, text, place)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"lone surrogate {text[error.start]!r} at character {error.start}"
        return refuse(place, "invalid UTF-8", detail)
    return keep(text, place)


def decode(place: Place, data: bytes) -> Document | Reject:
    """Strict UTF-8."""
    try:
        return keep(data.decode(), place)
    except UnicodeDecodeError as error:
        detail = f"byte 0x{data[error.start]:02x} at byte {error.start} of the document"
        return refuse(place, "invalid UTF-8", detail, data.count(b"\n", 0, error.start))


def keep(text: str, place: Place) -> Document | Reject:
    """A document, unless there is nothing in it."""
    return Document(text, place) if text else refuse(place, "empty document", "no characters")


def wrong_type(source: SourceConfig, value: object, place: Place) -> Reject:
    """A text field that holds something else."""
    return refuse(place, "not a string", f'field "{source.text_field}" is {json_type(value)}')


def refuse(place: Place, reason: str, detail: str, further: int = 0) -> Reject:
    """A reject at a place, `further` lines down."""
    return Reject(place.file, place.number(further), reason, detail)


def json_type(value: object) -> str:
    """A value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
