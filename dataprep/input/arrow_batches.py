"""Batches of Arrow files, and the types of their columns."""

from collections.abc import Iterator

import pyarrow as pa

from headrace.dataprep.input.arrow_messages import MAGIC
from headrace.dataprep.input.streams import open_random


def arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The batches of an IPC file or stream in order, mapped where the file is local."""
    with open_random(path) as stream:
        is_file = stream.read(len(MAGIC)) == MAGIC
        stream.seek(0)
        if not is_file:
            yield from pa.ipc.open_stream(stream)
            return
        file = pa.ipc.open_file(stream)
        for index in range(file.num_record_batches):
            yield file.get_batch(index)


def find_type(kind: pa.DataType, path: str) -> pa.DataType | None:
    """The type of what a dotted path names in a struct, as `find_field` finds it in a record."""
    if pa.types.is_struct(kind) and kind.get_field_index(path) >= 0:
        return kind.field(path).type
    head, _, rest = path.partition(".")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type if head.isdecimal() else None
    else:
        found = pa.types.is_struct(kind) and kind.get_field_index(head) >= 0
        inner = kind.field(head).type if found else None
    return find_type(inner, rest) if inner is not None and rest else inner


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column holds strings or bytes, in any of Arrow's layouts."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(strings or pa.types.is_string_view(kind) or is_bytes(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a column holds bytes, which may be UTF-8, as Spark writes it."""
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )
