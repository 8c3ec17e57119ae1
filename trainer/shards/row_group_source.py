"""Row groups as Arrow tables, fetched by byte range and checked before a value is used."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.schemas.retries import Patience
from headrace.schemas.seekable_file import SeekableFile
from headrace.schemas.shards.arrow_numbers import as_arrow, one_chunk
from headrace.schemas.shards.manifest import MAX_GROUP_TOKENS, Manifest
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_checks import check_size, check_unpacked
from headrace.schemas.shards.shard_rows import columns_of, read_row_group, repeated_text
from headrace.schemas.train.data_config import LoaderConfig
from headrace.trainer.shards.decoded_rows import DecodedRows, ListColumn
from headrace.trainer.shards.row_group_cache import RowGroupCache
from headrace.trainer.shards.row_groups import CorruptRowGroupError, RowGroup
from headrace.trainer.shards.shard_file import ShardFile, check_footer, damage
from headrace.trainer.shards.storage import open_storage, patience_of
from headrace.trainer.shards.token_pages import Ids, read_tokens

HELD_FOOTER_BYTES = 4 << 20  # as written: decoded they take ten times as much
TOKEN_COLUMN = "input_ids"


class RowGroupSource:
    """Reads row groups of one split of several shard directories.

    Args:
        columns: those that are wanted; of foreign files all are read.
        patience: with remote storages; None is what the config says.
    """

    def __init__(
        self,
        directories: Sequence[Path | str],
        manifests: Sequence[Manifest],
        split: str,
        config: LoaderConfig,
        columns: Sequence[str] = DecodedRows.COLUMNS,
        patience: Patience | None = None,
    ) -> None:
        self.columns = list(columns)
        patience = patience or patience_of(config)
        storages = [open_storage(str(directory), patience) for directory in directories]
        self.files = [
            [ShardFile(storage, manifest, record) for record in manifest.split(split)]
            for storage, manifest in zip(storages, manifests, strict=True)
        ]
        self.cache = open_cache(config, patience)
        self._footers: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def read(self, row_group: RowGroup) -> pa.Table:
        """The rows of one row group, in the shard format's columns.

        Raises:
            CorruptRowGroupError: naming shard, row group and rows.
            DataError: a file that is no shard of this format, or without one of its columns.
            StorageError: the storage does not answer.
        """
        file = self.files[row_group.dataset][row_group.shard]
        try:
            table = self._decode(file, row_group)
            problem = next(problems_in_rows(table, file.manifest), None)
        except OSError as error:
            problem = damage(file, error)
        except (ValueError, LookupError, OverflowError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())
        if problem is not None:
            raise corrupt(file, row_group, problem)
        return table

    def _decode(self, file: ShardFile, row_group: RowGroup) -> pa.Table:
        record = file.record.row_groups[row_group.group]
        footer = self._footer(file, (row_group.dataset, row_group.shard))
        names = columns_of(file.manifest, self.columns)
        pages = footer.row_group(row_group.group)
        check_size(pages, file.manifest, record, names)
        content = file.fetch(record.byte_offset, record.bytes, record.crc32, self.cache)
        segment = Segment(content, record.byte_offset, file.record.bytes)
        check_unpacked(pages, names, segment.part)
        parquet = pq.ParquetFile(
            segment,
            metadata=footer,
            read_dictionary=repeated_text(file.manifest),
            pre_buffer=False,
            page_checksum_verification=True,
        )

        def read(columns: list[str]) -> pa.Table:
            return read_row_group(parquet, row_group.group, file.manifest, file.record, columns)

        checked = record.crc32 is not None and file.manifest.columns is None
        if checked and TOKEN_COLUMN in self.columns:
            tokens = read_tokens(pages, memoryview(content), record.byte_offset)
            if tokens is not None:
                rest = read([c for c in self.columns if c != TOKEN_COLUMN])
                ends = row_ends(rest)
                if ends is not None and np.array_equal(ends, [*tokens.starts, len(tokens.ids)]):
                    return with_tokens(rest, tokens.ids, ends)
        return read(self.columns)

    def _footer(self, file: ShardFile, key: tuple[int, int]) -> pq.FileMetaData:
        """The file's Parquet metadata; the bytes of the last ones are held."""
        content = self._footers.pop(key, None)
        known = content is not None
        if content is None:
            content = file.fetch_footer(self.cache)
        footer = pq.read_metadata(pa.BufferReader(content))
        if not known:
            check_footer(footer, file)
        self._footers[key] = content
        while sum(map(len, self._footers.values())) > HELD_FOOTER_BYTES:
            self._footers.popitem(last=False)
        return footer


class Segment(SeekableFile):
    """A read-only file of which only one range of bytes is there."""

    def __init__(self, content: bytes, offset: int, size: int) -> None:
        super().__init__(size)
        self.content = memoryview(content)
        self.offset = offset

    def read(self, size: int | None = -1) -> bytes:
        content = bytes(self.part(self.position, -1 if size is None else size))
        self.position += len(content)
        return content

    def part(self, position: int, size: int) -> memoryview:
        """Return bytes from a position in the file on.

        Raises:
            OSError: they do not lie in the range.
        """
        start = position - self.offset
        if size < 0 or start < 0 or start + size > len(self.content):
            raise OSError(f"its footer points outside of the row group, to {position}")
        return self.content[start : start + size]


def row_ends(table: pa.Table) -> NDArray[np.int32] | None:
    """Return where rows begin by their document lengths, and the end; None if these cannot be."""
    column = one_chunk(table["document_lengths"])
    if column.null_count or column.flatten().null_count:
        return None
    lengths = ListColumn(table["document_lengths"])
    flat = lengths.flat()
    sound = len(flat) and flat.min() >= 1 and flat.sum(dtype=np.int64) <= MAX_GROUP_TOKENS
    return lengths.sums() if sound else None


def with_tokens(table: pa.Table, ids: Ids, ends: NDArray[np.int32]) -> pa.Table:
    """Return the table with its `input_ids`, cut into rows."""
    column = pa.ListArray.from_arrays(as_arrow(ends), as_arrow(ids))
    return table.add_column(0, pa.field(TOKEN_COLUMN, column.type, nullable=False), column)


def corrupt(file: ShardFile, row_group: RowGroup, problem: str) -> CorruptRowGroupError:
    """Return the error for a row group that is not what was written."""
    first = file.record.rows_before(row_group.group)
    return CorruptRowGroupError(
        f"{file.name}: row group {row_group.group} cannot be read, rows {first} to "
        f"{first + row_group.rows - 1} ({problem}); restore the file, or set "
        'loader.on_corrupt = "quarantine" to train on other rows in their place',
        problem,
    )


def open_cache(config: LoaderConfig, patience: Patience) -> RowGroupCache | None:
    """The node's cache, if the config names one."""
    if config.cache_dir is None:
        return None
    return RowGroupCache(Path(config.cache_dir), config.cache_bytes, patience.timeout)
