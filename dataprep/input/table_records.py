"""Records of Parquet files and of Arrow's IPC files and streams."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.dataprep.input.arrow_batches import arrow_batches, is_bytes
from headrace.dataprep.input.pieces import Columns, Piece
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.input.remote import is_remote
from headrace.dataprep.input.row_groups import BATCH_ROWS, check_group, group_batches, hold_group
from headrace.dataprep.input.row_sizes import Sizes, row_bytes
from headrace.dataprep.input.streams import open_random, refuse_bytes, refuse_large
from headrace.schemas.errors import DataError
from headrace.schemas.shards.unpacked_sizes import LARGE, is_bomb

MOST_BYTES = 4  # of a character in UTF-8
PICTURE_FIELDS = {"bytes", "path"}  # of pictures in tables of `datasets`
HELD_BYTES = 1 << 26  # of rows that are made into Python values at once


def read_parquet(
    piece: Piece, columns: Columns, arrays: bool, limit: int, large: int = LARGE
) -> Iterator[Record | Reject]:
    """Some row groups; of the columns, those that are there.

    Args:
        arrays: give lists of numbers as arrays.
        limit: characters of a record from which on it is refused.
        large: see `unpacked_sizes.is_bomb`.
    """
    path = piece.file.path
    rows_of = partial(batch_records, path, columns, arrays, limit)
    try:
        with open_random(path) as stream:
            metadata = pq.read_metadata(stream)
            remote = is_remote(path)
            number = sum(metadata.row_group(index).num_rows for index in range(piece.start))
            for index in range(piece.start, piece.end or 0):
                source = hold_group(stream, metadata, index, columns) if remote else stream
                group = check_group(source, metadata, index, columns, large)
                unpacked = Unpacked(group.packed, large)
                for batch in group_batches(source, metadata, group, columns):
                    yield from rows_of(batch, number, unpacked)
                    number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, "Parquet", error) from None


def read_arrow(
    piece: Piece, columns: Columns, arrays: bool, limit: int, large: int = LARGE
) -> Iterator[Record | Reject]:
    """Some record batches; of the columns, those that are there."""
    path = piece.file.path
    rows_of = partial(batch_records, path, columns, arrays, limit)
    number = 0
    try:
        for index, batch in enumerate(arrow_batches(path)):
            if piece.end is not None and index >= piece.end:
                break
            if index >= piece.start:
                names = [n for n in batch.schema.names if columns is None or n in columns]
                batch.validate()
                wanted = batch.select(names)
                unpacked = Unpacked(batch.get_total_buffer_size(), large)
                yield from rows_of(wanted, number, unpacked)
            number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, "Arrow", error) from None


class UnpackedError(ValueError):
    """Rows that take very many times the bytes of their file."""


class Unpacked:
    """A count of what the rows of a part of a file take, against the bytes of that part."""

    def __init__(self, packed: int, large: int) -> None:
        self.packed = packed
        self.large = large
        self.bytes = 0

    def add(self, size: int) -> None:
        """Count more.

        Raises:
            UnpackedError: the rows are very many times what the file is.
        """
        self.bytes += size
        if is_bomb(self.packed, self.bytes, self.large):
            raise UnpackedError(
                f"its rows unpack from {self.packed} to more than {self.bytes} bytes, which is not "
                "read; write each text once"
            )


def batch_records(
    path: str,
    columns: Columns,
    arrays: bool,
    limit: int,
    batch: pa.RecordBatch,
    number: int,
    unpacked: Unpacked,
) -> Iterator[Record | Reject]:
    """The rows of a batch, the first of which is record `number` of the file, from 0.

    Those that are too large are refused before their values are made.
    """
    sizes = row_bytes(batch)
    for start, end in parts_of(sizes, MOST_BYTES * limit):
        size = int(sizes[start:end].sum())
        unpacked.add(size)
        if end == start + 1 and size > MOST_BYTES * limit:
            yield refuse_large(Place(path, 0, number + start), limit)
        else:
            part = batch.slice(start, end - start)
            part = part if columns is None else as_text(part)
            yield from part_records(part, path, number + start, arrays)


def parts_of(sizes: Sizes, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows that are made into values at once; one of more than `most` is alone."""
    start, held = 0, 0
    for place, size in enumerate(sizes.tolist()):
        full = held + size > min(HELD_BYTES, most) or place - start == BATCH_ROWS
        if place > start and full:
            yield start, place
            start, held = place, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose columns of bytes are read as UTF-8, checked when a row is read."""
    kinds = batch.schema.types
    if not any(text_type(kind) != kind for kind in kinds):
        return batch
    parts = [
        column.cast(options=pc.CastOptions(text_type(kind), allow_invalid_utf8=True))
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(parts, names=batch.schema.names)


def text_type(kind: pa.DataType) -> pa.DataType:
    """Return a type with strings in place of bytes, in lists and structs too, but for pictures as
    `datasets` keeps them.
    """
    if is_bytes(kind):
        return pa.large_string()
    if pa.types.is_dictionary(kind):
        return pa.large_string() if is_bytes(kind.value_type) else kind
    if pa.types.is_list(kind):
        return pa.list_(text_type(kind.value_type))
    if pa.types.is_struct(kind) and {field.name for field in kind} == PICTURE_FIELDS:
        return kind
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(text_type(field.type)) for field in kind])
    return kind


def damaged(path: str, kind: str, error: Exception) -> DataError:
    """A file that cannot be read to its end."""
    if isinstance(error, UnpackedError):
        return DataError(f"{path}: {error}")
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path}: damaged {kind} ({reason}); replace the file")


def part_records(
    batch: pa.RecordBatch, path: str, number: int, arrays: bool
) -> Iterator[Record | Reject]:
    """The rows of a part of a batch."""
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
