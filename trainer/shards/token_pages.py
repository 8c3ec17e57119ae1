"""Token ids straight from the Parquet pages that dataprep writes.

pyarrow spends two thirds of its time with `input_ids` on the levels that say where each list begins
(docs/notes.md), which the document lengths say as well. Pages of another kind are left to it.

Page layout: https://parquet.apache.org/docs/file-format/data-pages/.
"""

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.schemas.shards.parquet_pages import read_struct

TOKENS = "input_ids.list.element"
DATA_PAGE, BYTE_STREAM_SPLIT = 0, 9  # parquet.thrift
ID_BYTES = 4
BLOCK = 1 << 15  # ids joined at once, so that they stay in the processor's cache

Ids: TypeAlias = NDArray[np.integer[Any]]  # uint16 or int32


def read_tokens(row_group: pq.RowGroupMetaData, content: memoryview, offset: int) -> Ids | None:
    """The ids of all rows of a row group, one after the other.

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
    at, left = column.data_page_offset - offset, column.num_values
    while left > 0:
        header, at = read_struct(content, at)
        page = header.get(5, {})  # DataPageHeader
        if (header[1], page.get(2)) != (DATA_PAGE, BYTE_STREAM_SPLIT):
            return None
        packed = content[at : at + header[3]]
        values = values_of(pa.decompress(packed, header[2], "zstd"))
        if len(values) != ID_BYTES * page[1]:  # fewer: some are null, or lists are empty
            return None
        pages.append(join_streams(values.reshape(ID_BYTES, page[1])))
        at, left = at + header[3], left - page[1]
    return pages[0] if len(pages) == 1 else np.concatenate(pages)


def token_column(row_group: pq.RowGroupMetaData) -> pq.ColumnChunkMetaData | None:
    """The column chunk of `input_ids`, if its pages are of the kind that is read here."""
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema == TOKENS:
            known = column.physical_type == "INT32" and column.compression == "ZSTD"
            return column if known and not column.has_dictionary_page else None
    return None


def values_of(page: pa.Buffer) -> NDArray[np.uint8]:
    """Return the bytes that follow the repetition and definition levels."""
    content = np.frombuffer(page, dtype=np.uint8)
    start = 0
    for _ in range(2):
        start += 4 + int.from_bytes(content[start : start + 4].tobytes(), "little")
    return content[start:]


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
