"""The shuffle's end: each shard owns a range of row keys and gathers its rows from all tasks."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.dataprep.passes.picture_groups import picture_groups
from headrace.dataprep.passes.sorted_runs import ALL_KEYS, Runs, cut_keys
from headrace.dataprep.rows.row_tables import SortedRows, count_tokens, sides
from headrace.dataprep.text.fast_tokenizer import close_tokenizers
from headrace.dataprep.work.local_engine import start_light
from headrace.dataprep.work.workspace import Workspace, read_marker, write_marker
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.publish import rename_durably
from headrace.schemas.shards.manifest import RowGroupRecord, ShardRecord
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import TOKEN_COLUMNS, TRAIN, shard_file_name, shard_schema
from headrace.schemas.shards.shard_kind import ShardKind


@dataclass(frozen=True)
class Target:
    """A shard directory in the making, and how its files are written; small and picklable.

    Args:
        group_bytes: of pictures that end a row group; None: rows have no pictures.
    """

    space: Workspace
    kind: ShardKind
    rows_in_group: int
    group_bytes: int | None = None

    @property
    def schema(self) -> pa.Schema:
        """The columns of its rows."""
        return shard_schema(self.kind, self.group_bytes is not None)

    @property
    def options(self) -> dict[str, Any]:
        """The options of its Parquet."""
        return parquet_options(self.kind, self.group_bytes is not None)

    def groups(self, parts: Iterable[SortedRows]) -> Iterator[pa.Table]:
        """The row groups of sorted rows."""
        if self.group_bytes is None:
            return row_groups(parts, self.rows_in_group, self.schema)
        return picture_groups(parts, self.rows_in_group, self.group_bytes, self.schema)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: number `index` of `count`, from all rows of a split."""

    runs: Runs
    index: int
    count: int

    @property
    def file(self) -> str:
        """The shard's file name."""
        return shard_file_name(self.runs.split, self.index)

    @property
    def size(self) -> int:
        """Its share of the tokens."""
        return self.runs.tokens // self.count


def shard_key(target: Target, plan: ShardPlan) -> str:
    """Return the key of the work that decides the shard's bytes."""
    by_bytes = [] if target.group_bytes is None else [target.group_bytes]
    return fingerprint([plan.runs.work_key, plan.count, target.rows_in_group, *by_bytes])


def finished_shard(target: Target, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that an earlier run finished and that still lies there, or None."""
    output = target.space.output
    record = read_marker(output, plan.file, shard_key(target, plan), ShardRecord)
    path = output / plan.file
    whole = record is not None and path.is_file() and path.stat().st_size == record.bytes
    return record if whole else None


def write_shard(target: Target, plan: ShardPlan) -> ShardRecord:
    """Gather, sort and publish one shard; its bytes depend on the rows alone."""
    close_tokenizers()
    start_light()
    space, output = target.space, target.space.output
    unfinished = space.temporary(output / plan.file)
    keys = cut_keys(ALL_KEYS, plan.count)[plan.index]
    groups = range(plan.runs.groups)
    parts = plan.runs.read_sorted(space, groups, keys, plan.size, target.schema)
    counts: list[GroupCount] = []
    with pq.ParquetWriter(unfinished, target.schema, **target.options) as writer:
        for rows in target.groups(parts):
            writer.write_table(rows)
            counts.append(GroupCount(count_tokens(rows), count_trained(rows)))
    record = describe_written(unfinished, plan, counts)
    rename_durably(unfinished, output / plan.file)
    write_marker(target.space, plan.file, shard_key(target, plan), record)
    return record


def row_groups(parts: Iterable[SortedRows], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of all parts in tables of `size` rows, the last one smaller."""
    rest = schema.empty_table()
    for part in parts:
        rows = part.after(rest)
        whole = len(rows.order) - len(rows.order) % size
        for start in range(0, whole, size):
            yield rows.copy(start, start + size)
        rest = rows.copy(whole)
        del part, rows  # large, and not needed while the next is gathered
    if rest.num_rows:
        yield rest


class GroupCount(NamedTuple):
    """Counts of a row group, taken as it is written."""

    tokens: int
    trained: int


def describe_shard(path: Path, plan: ShardPlan) -> ShardRecord:
    """The manifest's record of a written file, its counts read back from it."""
    counts: list[GroupCount] = []
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            names = [name for name in file.schema_arrow.names if name in TOKEN_COLUMNS]
            rows = file.read_row_group(index, columns=names)
            counts.append(GroupCount(count_tokens(rows), count_trained(rows)))
    return describe_written(path, plan, counts)


def describe_written(path: Path, plan: ShardPlan, counts: list[GroupCount]) -> ShardRecord:
    """The manifest's record of a written file, whose row groups have been counted."""
    metadata = pq.read_metadata(path)
    found = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    groups = [
        place_row_group(group, count.tokens) for group, count in zip(found, counts, strict=True)
    ]
    record = ShardRecord(
        file=plan.file,
        split="train" if plan.runs.split == TRAIN else "evaluation",
        rows=sum(group.rows for group in groups),
        tokens=sum(group.tokens for group in groups),
        trained_tokens=sum(count.trained for count in counts),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        row_groups=groups,
    )
    return with_checksums(path, record)


def with_checksums(path: Path, record: ShardRecord) -> ShardRecord:
    """The record with the CRC-32 of each row group's bytes, and of the footer's."""
    with path.open("rb") as file:

        def checksum(offset: int, size: int) -> int:
            file.seek(offset)
            return zlib.crc32(file.read(size))

        groups = [
            group.model_copy(update={"crc32": checksum(group.byte_offset, group.bytes)})
            for group in record.row_groups
        ]
        footer = checksum(record.footer_offset, record.bytes - record.footer_offset)
    return record.model_copy(update={"row_groups": groups, "footer_crc32": footer})


def describe_row_group(group: pq.RowGroupMetaData, rows: pa.Table) -> RowGroupRecord:
    """Rows, tokens and place of one row group."""
    return place_row_group(group, count_tokens(rows))


def place_row_group(group: pq.RowGroupMetaData, tokens: int) -> RowGroupRecord:
    """The record of a row group of so many tokens; its columns lie one after another."""
    columns = [group.column(index) for index in range(group.num_columns)]
    return RowGroupRecord(
        rows=group.num_rows,
        tokens=tokens,
        byte_offset=min(c.dictionary_page_offset or c.data_page_offset for c in columns),
        bytes=sum(column.total_compressed_size for column in columns),
    )


def count_trained(rows: pa.Table) -> int:
    """Tokens with a loss, of both sides of a pair."""
    return sum(count_marked(rows[ids], rows[mask]) for ids, mask in sides(rows))


def count_marked(ids: pa.ChunkedArray, mask: pa.ChunkedArray) -> int:
    """Count all tokens of rows without a mask, and the marked ones of rows with one."""
    unmasked = ids if mask.null_count == len(mask) else ids.filter(pc.is_null(mask))
    marked = sum(pc.sum(chunk.flatten()).as_py() or 0 for chunk in mask.chunks)
    return sum(len(chunk.flatten()) for chunk in unmasked.chunks) + marked
