"""Records of CSV and TSV files; the first row names the fields."""

import csv
import json
from collections.abc import Iterator
from itertools import islice

from headrace.dataprep.input.csv_scan import Span, scan_csv
from headrace.dataprep.input.pieces import Columns, Piece
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.input.streams import line_of, refuse, refuse_large
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.source_config import DELIMITERS, SourceConfig

OTHERS = (";", "\t", "|", ",")  # delimiters that files have in place of the expected one
ANY_SIZE = (1 << 63) - 1  # records are limited before they are parsed


def read_csv(
    piece: Piece, columns: Columns, delimiter: str, limit: int
) -> Iterator[Record | Reject]:
    """Each row as a record of strings; a quoted field may hold delimiters and line breaks.

    Raises:
        DataError: no row names the fields, two have the same name, or a quote is never closed.
    """
    path = piece.file.path
    header: list[str] | None = None
    if piece.start:
        first = next(scan_csv(path, delimiter, 0, limit))
        header = read_header(first, Place(path, 0, 0), delimiter)
    for span in scan_csv(path, delimiter, piece.start, limit):
        if piece.end is not None and span.start >= piece.end:
            return
        place = Place(path, piece.start, span.line)
        if header is None:
            header = read_header(span, place, delimiter)
        elif span.open:
            raise DataError(
                f"{path}:{line_of(place)}: a quote that is opened here is never closed; "
                "repair the file"
            )
        elif span.data is None:
            yield refuse_large(place, limit)
        elif record := take_row(header, span.data, columns, place, delimiter):
            yield record


def find_delimiter(source: SourceConfig, path: str, kind: str, limit: int) -> str:
    """Return what stands between fields: what the config says; else what the first row tells.

    It is another one than usual where the first row would be one field by that, and by the other
    has several, as many as the second row.
    """
    usual = DELIMITERS["tsv" if kind == "tsv" else "csv"]
    if source.delimiter is not None:
        return source.delimiter
    first = list(islice(scan_csv(path, usual, 0, limit), 1))
    if not first or first[0].data is None or len(fields_of(first[0].data, usual)) != 1:
        return usual
    found = [other for other in OTHERS if other != usual and has_columns(path, other, limit)]
    return found[0] if len(found) == 1 else usual


def has_columns(path: str, delimiter: str, limit: int) -> bool:
    """Return whether the first two rows have equally many fields, and more than one."""
    rows = [span.data or b"" for span in islice(scan_csv(path, delimiter, 0, limit), 2)]
    counts = {len(fields_of(row, delimiter)) for row in rows}
    return len(counts) == 1 and counts.pop() > 1


def fields_of(data: bytes, delimiter: str) -> list[str]:
    """The fields of a record; none where it is broken."""
    try:
        return parse_row(data, delimiter)
    except csv.Error:
        return []


def parse_row(data: bytes, delimiter: str) -> list[str]:
    """The fields of one record; bytes that are no UTF-8 become lone surrogates.

    Raises:
        csv.Error: it is broken.
    """
    csv.field_size_limit(ANY_SIZE)
    text = data.decode(errors="surrogateescape")
    return next(csv.reader((text,), delimiter=delimiter, strict=True))


def read_header(span: Span, place: Place, delimiter: str) -> list[str]:
    """The names in the first row."""
    try:
        if span.data is None or span.open:
            raise csv.Error("a quote may never be closed, or the line ends be missing")
        names = parse_row(span.data, delimiter)
    except csv.Error as error:
        raise DataError(
            f"{place.file}:{line_of(place)}: the first row does not name the fields ({error}); "
            "repair the file"
        ) from None
    if len(names) == 1 and (other := next((s for s in OTHERS if s in names[0]), None)):
        raise DataError(
            f"{place.file}:1: the first row is one field, {names[0][:60]!r}; set delimiter = "
            f"{json.dumps(other)} of the source, or rename the column"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f'{place.file}:1: two columns are named "{twice[0]}"; rename one')
    return names


def take_row(
    header: list[str], data: bytes, columns: Columns, place: Place, delimiter: str
) -> Record | Reject | None:
    """One row by the names of its columns; None for a blank line."""
    try:
        row = parse_row(data, delimiter)
    except csv.Error as error:
        return refuse(place, "broken CSV", str(error))
    if not row:
        return None
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
    return Record(fields, place, header)
