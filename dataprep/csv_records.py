"""Records of CSV and TSV files; the first row names the fields."""

import csv
from collections.abc import Iterator

from headrace.dataprep.records import Record, Reject, refuse
from headrace.dataprep.streams import CHUNK_BYTES, Place, open_bytes, read_chunk
from headrace.dataprep.tasks import Columns, Piece
from headrace.schemas.errors import DataError


def read_csv(
    piece: Piece, columns: Columns, delimiter: str, limit: int
) -> Iterator[Record | Reject]:
    """Each row as a record of strings; a quoted field may hold delimiters and line breaks."""
    path = piece.file.path
    lines = LineReader(path)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = Place(path, 0, rows.line_num)
        csv.field_size_limit(limit)
        try:
            row = next(rows, None)
        except csv.Error as error:
            if header is None or lines.ended or str(error).startswith("field larger"):
                raise DataError(
                    f"{path}:{place.number()}: {error}; a quote that is opened here may never be "
                    "closed; repair the file"
                ) from None
            yield refuse(place, "broken CSV", str(error))
            continue
        if row is None:
            return
        if header is None:
            header = check_header(path, row)
        elif row:
            yield take_row(header, row, columns, place)


def check_header(path: str, names: list[str]) -> list[str]:
    """The names in the first row."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f'{path}:1: two columns are named "{twice[0]}"; rename one')
    return names


def take_row(header: list[str], row: list[str], columns: Columns, place: Place) -> Record | Reject:
    """One row by the names of its columns."""
    if len(row) != len(header):
        detail = f"{len(row)} fields, the first row has {len(header)}"
        return refuse(place, "wrong number of fields", detail)
    fields = {n: v for n, v in zip(header, row, strict=True) if columns is None or n in columns}
    for name, value in fields.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            detail = f"byte 0x{ord(value[error.start]) - 0xDC00:02x} in field {name!r}"
            return refuse(place, "invalid UTF-8", detail)
    return Record(fields, place)


class LineReader:
    """Lines of a file as text with their ends; bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, path: str) -> None:
        self.lines = read_lines(path)
        self.ended = False

    def __iter__(self) -> "LineReader":
        return self

    def __next__(self) -> str:
        try:
            return next(self.lines).decode(errors="surrogateescape")
        except StopIteration:
            self.ended = True
            raise


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file with their ends, without a byte order mark."""
    rest = b""
    with open_bytes(path) as stream:
        first = True
        while chunk := read_chunk(stream, path, max(CHUNK_BYTES, len(rest))):
            chunk = chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk
            first = False
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
    if rest:
        yield rest
