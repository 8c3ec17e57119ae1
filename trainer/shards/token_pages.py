"""Token ids straight from the Parquet pages that dataprep writes.

pyarrow spends two thirds of its time with `input_ids` on the levels that say where each list begins
(docs/notes.md). Document lengths say it as well; only the starts of rows are compared with them.
Pages of another kind are left to it.

Page layout: https://parquet.apache.org/docs/file-format/data-pages/.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.schemas.shards.parquet_pages import read_struct, read_varint

TOKENS = "input_ids.list.element"
DATA_PAGE, BYTE_STREAM_SPLIT = 0, 9  # parquet.thrift
ID_BYTES = 4
ZERO_BITS = [tuple(bit for bit in range(8) if not byte >> bit & 1) for byte in range(256)]
BLOCK = 1 << 15  # ids joined at once, so that they stay in the processor's cache

Ids: TypeAlias = NDArray[np.integer[Any]]  # uint16 or int32


class Tokens(NamedTuple):
    """The ids of all rows, one after the other, and the place at which each row starts."""

    ids: Ids
    starts: list[int]


def read_tokens(row_group: pq.RowGroupMetaData, content: memoryview, offset: int) -> Tokens | None:
    """Return the ids of all rows of a row group.

    Args:
        content: the bytes of the row group, checked.
        offset: of `content` in its file.

    Returns:
        In two bytes each where all are below 65,536, which is half the memory. None when the ids
        are written in another way, or are not all there.
    """
    column = token_column(row_group)
    if column is None:
        return None
    pages: list[Ids] = []
    starts: list[int] = []
    at, left = column.data_page_offset - offset, column.num_values
    while left > 0:
        header, at = read_struct(content, at)
        page = header.get(5, {})  # DataPageHeader
        if (header[1], page.get(2)) != (DATA_PAGE, BYTE_STREAM_SPLIT):
            return None
        packed = content[at : at + header[3]]
        levels, values = parts_of(pa.decompress(packed, header[2], "zstd"))
        if len(values) != ID_BYTES * page[1]:  # fewer: some are null, or lists are empty
            return None
        pages.append(join_streams(values.reshape(ID_BYTES, page[1])))
        before = column.num_values - left
        zeros = zero_levels(levels, page[1])
        starts += [before + place for place in zeros] if before else zeros
        at, left = at + header[3], left - page[1]
    return Tokens(pages[0] if len(pages) == 1 else np.concatenate(pages), starts)


def token_column(row_group: pq.RowGroupMetaData) -> pq.ColumnChunkMetaData | None:
    """The column chunk of `input_ids`, if its pages are of the kind that is read here."""
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema == TOKENS:
            known = column.physical_type == "INT32" and column.compression == "ZSTD"
            return column if known and not column.has_dictionary_page else None
    return None


def parts_of(page: pa.Buffer) -> tuple[bytes, NDArray[np.uint8]]:
    """Return a page's repetition levels, and what follows them and the definition levels."""
    content = np.frombuffer(page, dtype=np.uint8)
    start = 0
    levels = []
    for _ in range(2):
        size = int.from_bytes(content[start : start + 4].tobytes(), "little")
        levels.append(content[start + 4 : start + 4 + size].tobytes())
        start += 4 + size
    return levels[0], content[start:]


def zero_levels(levels: bytes, count: int) -> list[int]:
    """Return the places of the zeros among repetition levels of one bit: there lists begin.

    They are runs of one level, or of packed bits:
    https://parquet.apache.org/docs/file-format/data-pages/encodings/#RLE.

    Raises:
        IndexError, ValueError: they end too early, or hold an empty run.
    """
    zeros: list[int] = []
    at = place = 0
    while place < count:
        head, at = levels[at], at + 1
        if head & 128:  # a number of several bytes: mostly of two, for a run of up to 8,191
            head, at = head & 127 | levels[at] << 7, at + 1
            if head >> 14:
                head, at = read_varint(memoryview(levels), at - 2)
        length = head >> 1
        if not length:
            raise ValueError("repetition levels with an empty run")
        if head == 3:  # a single byte of bits
            for bit in ZERO_BITS[levels[at]]:
                zeros.append(place + bit)
            at, place = at + 1, place + 8
        elif head & 1:
            bits = np.frombuffer(levels, np.uint8, min(length, len(levels) - at), at)
            found = np.flatnonzero(np.unpackbits(bits, bitorder="little") == 0)
            zeros += (found + place).tolist()
            at, place = at + length, place + 8 * length
        else:
            if not levels[at]:
                zeros += range(place, min(place + length, count))
            at, place = at + 1, place + length
    while zeros and zeros[-1] >= count:  # bits that fill the last byte
        zeros.pop()
    return zeros


def join_streams(streams: NDArray[np.uint8]) -> Ids:
    """Undo BYTE_STREAM_SPLIT: stream k holds byte k of each id, the lowest first."""
    top = max((k for k in range(len(streams)) if streams[k].any()), default=0)
    short = top < np.dtype(np.uint16).itemsize
    ids: Ids = np.empty(streams.shape[1], dtype=np.uint16 if short else np.int32)
    for start in range(0, len(ids), BLOCK):
        part, block = streams[:, start : start + BLOCK], ids[start : start + BLOCK]
        block[:] = part[top]
        for k in range(top - 1, -1, -1):
            block <<= 8
            block |= part[k]
    return ids
