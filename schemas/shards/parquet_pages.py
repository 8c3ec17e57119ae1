"""Sizes of Parquet pages, read from their headers before one of them is unpacked.

Page headers are structs of Thrift's compact protocol:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, and fields of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

BOOLS, BYTE, INTEGERS, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 8, 12  # of the compact protocol
MAX_DEPTH = 8
MAX_VARINT_BITS = 70
HEADER_BYTES = 1 << 16
UNPACKED, PACKED = 2, 3  # fields of PageHeader: bytes
DATA_PAGES, DICTIONARY_PAGE = (5, 8), 7  # and the structs that count the values of a page
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8, "INT96": 12}
LEVEL_BYTES = 4  # of a value: its repetition and definition levels, or where it begins
SLACK_BYTES = 1 << 16  # by which the sizes in the footers of other writers may differ

Read = Callable[[int, int], bytes | memoryview]  # offset in the file, bytes


def unpacked_bytes(column: pq.ColumnChunkMetaData) -> int:
    """Return about how much memory a column chunk takes when it is read, as its footer says."""
    width = WIDTHS.get(column.physical_type, 0) + LEVEL_BYTES
    return int(column.total_uncompressed_size) + int(column.num_values) * width


def check_pages(column: pq.ColumnChunkMetaData, read: Read) -> None:
    """Check that the pages of a column chunk unpack to what the footer says, and hold its values.

    Arrow reserves what the headers of pages ask for, whatever the footer says.

    Raises:
        ValueError: they do not.
    """
    name = column.path_in_schema
    at = start_of(column)
    end, values, unpacked = at + column.total_compressed_size, 0, 0
    while at < end and values < column.num_values:
        header, length = page_header(read(at, min(HEADER_BYTES, end - at)), name)
        unpacked += header[UNPACKED]
        values += next((header[kind].get(1, 0) for kind in DATA_PAGES if kind in header), 0)
        at += length + header[PACKED]
    if at > end or values > column.num_values:
        raise ValueError(f"column {name}: its pages do not end where the footer says")
    if unpacked > 2 * column.total_uncompressed_size + SLACK_BYTES:
        raise ValueError(
            f"column {name}: its pages unpack to {unpacked:,} bytes, the footer says "
            f"{column.total_uncompressed_size:,}"
        )


def start_of(column: pq.ColumnChunkMetaData) -> int:
    """Return where the first page of a column chunk begins in its file."""
    offset = column.dictionary_page_offset if column.has_dictionary_page else None
    return int(offset or column.data_page_offset)


def page_header(content: bytes | memoryview, name: str) -> tuple[dict[int, Any], int]:
    """Return the header that a page begins with, and its length.

    Raises:
        ValueError: it is cut off, or holds sizes that cannot be.
    """
    try:
        header, length = read_struct(memoryview(content), 0)
    except IndexError:
        raise ValueError(f"column {name}: the header of a page is cut off") from None
    counts = [header[kind].get(1, -1) for kind in (*DATA_PAGES, DICTIONARY_PAGE) if kind in header]
    if any(size < 0 for size in (header.get(UNPACKED, -1), header.get(PACKED, -1), *counts)):
        raise ValueError(f"column {name}: the header of a page holds no sizes that can be")
    return header, length


def read_struct(content: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return a struct of the compact protocol by its fields' numbers, and where the next byte is.

    Raises:
        ValueError: a field of a type that page headers do not have.
        IndexError: it goes on after the end.
    """
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        kind, at = head & 15, at + 1
        number += head >> 4
        if not head >> 4:
            folded, at = read_varint(content, at)
            number = unfold(folded)
        if kind in BOOLS:
            fields[number] = kind == BOOLS[0]
        elif kind in INTEGERS:
            folded, at = read_varint(content, at)
            fields[number] = unfold(folded)
        elif kind == BYTE:
            fields[number], at = content[at], at + 1
        elif kind == BINARY:
            size, at = read_varint(content, at)
            at += size
        elif kind == STRUCT and depth < MAX_DEPTH:
            fields[number], at = read_struct(content, at, depth + 1)
        else:
            raise ValueError(f"a page header with a field of type {kind}")
    return fields, at + 1


def unfold(folded: int) -> int:
    """Return the signed integer of a folded one (zigzag)."""
    return (folded >> 1) ^ -(folded & 1)


def read_varint(content: memoryview, at: int) -> tuple[int, int]:
    """Return an unsigned integer in parts of seven bits, lowest first, and where the next byte is.

    Raises:
        ValueError: it has more bits than an integer of 64.
    """
    value = shift = 0
    while shift < MAX_VARINT_BITS:
        byte, at = content[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("a page header with an endless number")
