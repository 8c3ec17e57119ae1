"""Bytes that the rows of a table take as Python values, told before they are made.

Arrow keeps a text that many rows have once, in a dictionary or a buffer that they all look into; as
values, each row has its own.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NUMBER_BYTES = 4  # of what is neither text, list nor struct, as `characters` counts
VIEW_BYTES = 16  # of the head of a text in a column of views

Sizes = NDArray[np.int64]


def row_bytes(batch: pa.RecordBatch) -> Sizes:
    """The bytes of each row, shape [rows].

    Raises:
        ValueError: offsets or indices that lead outside of their values.
    """
    total = np.zeros(batch.num_rows, np.int64)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            total += value_bytes(column)
        except (IndexError, ValueError) as error:
            raise ValueError(f"column {name}: {error}") from None
    return total


def value_bytes(column: pa.Array) -> Sizes:
    """The bytes of each value of a column."""
    kind = column.type
    types = pa.types
    if isinstance(column, pa.ExtensionArray):
        return value_bytes(column.storage)
    if types.is_dictionary(kind):
        sizes = pick(value_bytes(column.dictionary), column.indices.fill_null(0))
        return sizes * np.asarray(column.is_valid())
    if types.is_run_end_encoded(kind):
        places = np.arange(column.offset, column.offset + len(column))
        ends = np.asarray(column.run_ends.to_numpy(zero_copy_only=False))
        return value_bytes(column.values)[np.searchsorted(ends, places, side="right")]
    if types.is_struct(kind):
        children = [value_bytes(column.field(index)) for index in range(kind.num_fields)]
        return sum(children, np.zeros(len(column), np.int64))
    if types.is_string_view(kind) or types.is_binary_view(kind):
        heads = np.frombuffer(column.buffers()[1], np.int32)[:: VIEW_BYTES // 4]
        return checked(heads[column.offset : column.offset + len(column)].astype(np.int64))
    if types.is_fixed_size_list(kind):
        each = value_bytes(column.values.slice(column.offset * kind.list_size))
        return each[: len(column) * kind.list_size].reshape(len(column), -1).sum(axis=1)
    if hasattr(column, "offsets") or is_plain_text(kind):
        return between(column)
    width = kind.byte_width if types.is_fixed_size_binary(kind) else NUMBER_BYTES
    return np.full(len(column), width, np.int64)


def is_plain_text(kind: pa.DataType) -> bool:
    """Return whether texts or bytes lie one after the other."""
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )


def between(column: pa.Array) -> Sizes:
    """The bytes of texts or lists, which offsets bound."""
    kind = column.type
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if is_plain_text(kind):
        form = np.int64 if large else np.int32
        offsets: NDArray[Any] = np.zeros(1, form)
        if len(column):
            offsets = np.frombuffer(column.buffers()[1], form)
            offsets = offsets[column.offset : column.offset + len(column) + 1]
        bounds = offsets.astype(np.int64)
        return checked(bounds[1:] - bounds[:-1])
    offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    if hasattr(column, "sizes"):  # lists of a view, which may overlap
        starts, lengths = offsets, column.sizes.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        starts, lengths = offsets[:-1], offsets[1:] - offsets[:-1]
    values = entries(column)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(value_bytes(values))])
    return pick(sums, starts + checked(lengths)) - pick(sums, starts)


def entries(column: pa.Array) -> pa.Array:
    """The values of all lists, those of a map as structs."""
    if not pa.types.is_map(column.type):
        return column.values
    return pa.StructArray.from_arrays([column.keys, column.items], ["key", "value"])


def pick(sizes: Sizes, places: Any) -> Sizes:
    """The sizes at some places. Raises ValueError where there is none."""
    if isinstance(places, pa.Array):
        places = places.to_numpy(zero_copy_only=False)
    if len(places) and not (int(places.min()) >= 0 and int(places.max()) < len(sizes)):
        raise ValueError("an index or offset that leads outside of the values")
    return sizes[places] if len(places) else np.zeros(0, np.int64)


def checked(lengths: Sizes) -> Sizes:
    """Lengths, none of them negative."""
    if len(lengths) and lengths.min() < 0:
        raise ValueError("offsets that do not rise")
    return lengths
