"""Row groups of Parquet files: how each is read, so that no value comes unforeseen."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.schemas.seekable_file import SeekableFile
from headrace.schemas.shards.parquet_pages import check_pages, reader_of, start_of
from headrace.schemas.shards.unpacked_sizes import LARGE

BATCH_ROWS = 256
NUMBERS = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE")


class RowGroup(NamedTuple):
    """Way to read the rows of a row group: so many at a time, some columns as dictionaries."""

    number: int
    packed: int
    batch_rows: int
    dictionaries: list[str]


def hold_group(
    stream: pa.NativeFile, metadata: pq.FileMetaData, index: int, columns: Collection[str] | None
) -> pa.NativeFile:
    """A remote file of which the wanted columns of a row group have been read, each at once."""
    chunks = wanted_chunks(metadata, index, columns)
    spans = [(start_of(chunk), chunk.total_compressed_size) for chunk, _ in chunks]
    held = [(start, bytes(stream.read_at(size, start))) for start, size in spans]
    return pa.PythonFile(HeldFile(stream.size(), held), mode="r")


class HeldFile(SeekableFile):
    """Parts of a file that lies elsewhere."""

    def __init__(self, size: int, held: list[tuple[int, bytes]]) -> None:
        super().__init__(size)
        self.held = held

    def readinto(self, buffer: Any) -> int:
        """Read from the part that the position lies in; nothing elsewhere."""
        for start, content in self.held:
            offset = self.position - start
            if 0 <= offset < len(content):
                data = content[offset : offset + len(buffer)]
                buffer[: len(data)] = data
                self.position += len(data)
                return len(data)
        return 0


def wanted_chunks(
    metadata: pq.FileMetaData, index: int, columns: Collection[str] | None
) -> Iterator[tuple[pq.ColumnChunkMetaData, pq.ColumnSchema]]:
    """The column chunks of a row group that are read."""
    group = metadata.row_group(index)
    for place in range(group.num_columns):
        schema = metadata.schema.column(place)
        if columns is None or schema.path.split(".")[0] in columns:
            yield group.column(place), schema


def check_group(
    stream: pa.NativeFile,
    metadata: pq.FileMetaData,
    index: int,
    columns: Collection[str] | None,
    large: int = LARGE,
) -> RowGroup:
    """Decide how a row group is read, from the headers of its pages.

    Args:
        large: bytes of a column up to which it does no harm, however it is packed.

    Raises:
        ValueError: its pages are not what the footer says, or their values may be without bounds.
    """
    batch_rows, packed = BATCH_ROWS, 0
    dictionaries: list[str] = []
    for column, schema in wanted_chunks(metadata, index, columns):
        pages = check_pages(column, reader_of(stream))
        packed += column.total_compressed_size
        if pages.largest * pages.values <= large:
            continue
        if not schema.max_repetition_level:
            batch_rows = min(batch_rows, max(1, large // pages.largest))
        elif column.physical_type == "BYTE_ARRAY" and not pages.prefixed:
            dictionaries.append(schema.path)
        elif column.physical_type not in NUMBERS:
            raise ValueError(
                f"row group {index}: column {schema.path} holds lists of texts as differences, "
                "whose size cannot be told; write the file again without DELTA_BYTE_ARRAY"
            )
    return RowGroup(index, packed, batch_rows, dictionaries)


def group_batches(
    stream: pa.NativeFile,
    metadata: pq.FileMetaData,
    group: RowGroup,
    columns: Collection[str] | None,
) -> Iterator[pa.RecordBatch]:
    """The wanted columns of one row group, some rows at a time."""
    file = pq.ParquetFile(stream, metadata=metadata, read_dictionary=group.dictionaries)
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    return file.iter_batches(group.batch_rows, row_groups=[group.number], columns=names)
