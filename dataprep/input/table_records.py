"""Records of Parquet files and of Arrow's IPC files and streams."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.dataprep.input.arrow_batches import arrow_batches, is_bytes
from headrace.dataprep.input.pieces import Columns, Piece
from headrace.dataprep.input.records import Record, Reject, refuse_bytes
from headrace.dataprep.input.streams import Place, open_random
from headrace.schemas.errors import DataError

BATCH_ROWS = 256


def read_parquet(piece: Piece, columns: Columns, arrays: bool) -> Iterator[Record | Reject]:
    """Some row groups; of the columns, those that are there.

    Args:
        arrays: give lists of numbers as arrays.
    """
    path = piece.file.path
    with open_random(path) as stream, pq.ParquetFile(stream) as file:
        groups = list(range(piece.start, piece.end or 0))
        number = sum(file.metadata.row_group(index).num_rows for index in range(piece.start))
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names)
        try:
            for batch in batches:
                yield from batch_records(as_text(batch, columns), path, number, arrays)
                number += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise damaged(path, "Parquet", error) from None


def read_arrow(piece: Piece, columns: Columns, arrays: bool) -> Iterator[Record | Reject]:
    """Some record batches; of the columns, those that are there."""
    path = piece.file.path
    number = 0
    try:
        for index, batch in enumerate(arrow_batches(path)):
            if piece.end is not None and index >= piece.end:
                break
            if index >= piece.start:
                names = [n for n in batch.schema.names if columns is None or n in columns]
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    part = as_text(batch.select(names).slice(start, BATCH_ROWS), columns)
                    yield from batch_records(part, path, number + start, arrays)
            number += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, "Arrow", error) from None


def as_text(batch: pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """Return a batch whose named columns of bytes are read as UTF-8, checked when a row is read."""
    kinds = batch.schema.types
    if columns is None or not any(text_type(kind) != kind for kind in kinds):
        return batch
    parts = [
        column.cast(options=pc.CastOptions(text_type(kind), allow_invalid_utf8=True))
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(parts, names=batch.schema.names)


def text_type(kind: pa.DataType) -> pa.DataType:
    """Return a type with strings in place of bytes, in lists and structs too."""
    if is_bytes(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.list_(text_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(text_type(field.type)) for field in kind])
    return kind


def damaged(path: str, kind: str, error: Exception) -> DataError:
    """A file that cannot be read to its end."""
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path}: damaged {kind} ({reason}); replace the file")


def batch_records(
    batch: pa.RecordBatch, path: str, number: int, arrays: bool
) -> Iterator[Record | Reject]:
    """The rows of a batch, the first of which is record `number` of the file, from 0."""
    try:
        rows = to_rows(batch, arrays)
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


def to_rows(batch: pa.RecordBatch, arrays: bool) -> list[dict[str, Any]]:
    """Rows as dictionaries; lists of numbers as arrays if that is wanted."""
    if not arrays:
        return batch.to_pylist()
    columns = [to_arrays(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def to_arrays(column: pa.Array) -> list[Any]:
    """The values of a column, lists of numbers as arrays."""
    if not is_numbers(column.type):
        return column.to_pylist()
    return [None if value.values is None else to_numpy(value.values) for value in column]


def to_numpy(values: pa.Array) -> Any:
    """Numbers as an array; with missing ones among them, a list."""
    return values.to_pylist() if values.null_count else values.to_numpy(zero_copy_only=False)


def is_numbers(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of integers or booleans."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists and not pa.types.is_fixed_size_list(kind):
        return False
    return pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
