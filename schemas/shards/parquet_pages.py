"""Sizes of Parquet pages, read from their headers before one of them is unpacked.

Page headers are structs of Thrift's compact protocol:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, and fields of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

BOOLS, BYTE, INTEGERS, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 8, 12  # of the compact protocol
MAX_DEPTH = 8
MAX_VARINT_BITS = 70
HEADER_BYTES = 1 << 16
UNPACKED, PACKED = 2, 3  # fields of PageHeader: bytes
DATA_PAGES, DICTIONARY_PAGE = (5, 8), 7  # and the structs that count the values of a page
ENCODING_FIELDS = (2, 4)  # in the structs of data pages
INDICES, PREFIXED = (2, 8), 7  # encodings: indices of a dictionary, and DELTA_BYTE_ARRAY
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8, "INT96": 12}
LEVEL_BYTES = 4  # of a value: its repetition and definition levels, or where it begins
SLACK_BYTES = 1 << 16  # by which the sizes in the footers of other writers may differ

Read = Callable[[int, int], bytes | memoryview]  # offset in the file, bytes


def unpacked_bytes(column: pq.ColumnChunkMetaData) -> int:
    """Return about how much memory a column chunk takes when it is read, as its footer says."""
    width = WIDTHS.get(column.physical_type, 0) + LEVEL_BYTES
    return int(column.total_uncompressed_size) + int(column.num_values) * width


class Pages(NamedTuple):
    """Pages of a column chunk whose values may take more memory than the pages themselves.

    `values` refer to a dictionary, or to the value before them; none of them is larger than
    `largest` bytes. `prefixed` says that some are of the latter kind.
    """

    values: int
    largest: int
    prefixed: bool


def check_pages(column: pq.ColumnChunkMetaData, read: Read) -> Pages:
    """Check that the pages of a column chunk unpack to what the footer says, and hold its values.

    Arrow reserves what the headers of pages ask for, whatever the footer says.

    Raises:
        ValueError: they do not.
    """
    name = column.path_in_schema
    headers = list(page_headers(column, read))
    values = sum(number_of_values(header) for header in headers)
    unpacked = sum(header[UNPACKED] for header in headers)
    if values > column.num_values:
        raise ValueError(f"column {name}: its pages do not end where the footer says")
    if unpacked > 2 * column.total_uncompressed_size + SLACK_BYTES:
        raise ValueError(
            f"column {name}: its pages unpack to {unpacked:,} bytes, the footer says "
            f"{column.total_uncompressed_size:,}"
        )
    prefixed = [header for header in headers if encoding(header) == PREFIXED]
    wide = [header for header in headers if DICTIONARY_PAGE in header] + prefixed
    growing = [header for header in headers if encoding(header) in (*INDICES, PREFIXED)]
    return Pages(
        sum(map(number_of_values, growing)),
        max((header[UNPACKED] for header in wide), default=0),
        bool(prefixed),
    )


def page_headers(column: pq.ColumnChunkMetaData, read: Read) -> Iterator[dict[int, Any]]:
    """Yield the headers of the pages of a column chunk, up to the one with its last value."""
    name = column.path_in_schema
    at = start_of(column)
    end, values = at + column.total_compressed_size, 0
    while at < end and values < column.num_values:
        header, length = page_header(read(at, min(HEADER_BYTES, end - at)), name)
        yield header
        values += number_of_values(header)
        at += length + header[PACKED]
    if at > end:
        raise ValueError(f"column {name}: its pages do not end where the footer says")


def number_of_values(header: dict[int, Any]) -> int:
    """Return the values of a data page, 0 for another one."""
    return int(next((header[kind].get(1, 0) for kind in DATA_PAGES if kind in header), 0))


def encoding(header: dict[int, Any]) -> int:
    """Return the encoding of a data page by its number, -1 for another page."""
    fields = dict(zip(DATA_PAGES, ENCODING_FIELDS, strict=True))
    return next((int(header[k].get(fields[k], -1)) for k in DATA_PAGES if k in header), -1)


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


def reader_of(file: BinaryIO) -> Read:
    """Return what reads a part of an open file."""

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read
