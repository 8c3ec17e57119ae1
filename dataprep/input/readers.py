"""The records of one piece of input, by the kind of its file."""

from collections.abc import Iterator

from headrace.dataprep.input.csv_records import find_delimiter, read_csv
from headrace.dataprep.input.json_records import Wanted, read_json_list, read_lines
from headrace.dataprep.input.pieces import Columns, Piece
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.input.streams import BOM, decode, read_all, refuse_large, split_range
from headrace.dataprep.input.table_records import read_arrow, read_parquet
from headrace.schemas.prepare.source_config import WHOLE_FILES, SourceConfig

LIST_FIELDS = {"chat": "messages"}  # a row may be the list of messages itself


def read_records(
    source: SourceConfig, piece: Piece, columns: Columns, limit: int
) -> Iterator[Record | Reject]:
    """The records of a piece in file order, and in their places those that were refused.

    Args:
        columns: the fields to read; None: all.
        limit: bytes of a text or line from which on it is refused unread.
    """
    wanted = Wanted(columns, LIST_FIELDS.get(source.type))
    arrays = source.type == "pretokenized"
    match piece.format:
        case "text":
            return read_text(source, piece, limit)
        case "jsonl":
            return read_lines(piece, wanted, limit)
        case "json" | "objects" | "inside":
            return read_json_list(piece, wanted, limit)
        case "csv" | "tsv":
            delimiter = find_delimiter(source, piece.file.path, piece.format, limit)
            return read_csv(piece, columns, delimiter, limit)
        case "parquet":
            return read_parquet(piece, columns, arrays, limit)
        case "arrow":
            return read_arrow(piece, columns, arrays, limit)


def read_text(source: SourceConfig, piece: Piece, limit: int) -> Iterator[Record | Reject]:
    """A text file as one record, or cut at the separator."""
    path = piece.file.path
    pieces: Iterator[tuple[Place, bytes | None]]
    if source.separator is None:
        content = read_all(path, limit)
        whole = None if content is None else content.removeprefix(BOM)
        pieces = iter([(Place(path, 0, 0), whole)])
    else:
        separator = source.separator.encode()
        pieces = split_range(path, separator, piece.start, piece.end, limit)
    for place, data in pieces:
        if data is not None and source.type == "axolotl":  # lines, of which empty ones are no rows
            data = data.removesuffix(b"\r")
            if not data.strip():
                continue
        if data is not None and source.extract in WHOLE_FILES:
            yield Record({source.text_field: data}, place)
            continue
        text = refuse_large(place, limit) if data is None else decode(place, data)
        yield text if isinstance(text, Reject) else Record({source.text_field: text}, place)
