"""The exchange: each shard owns a range of row keys and gathers its rows from all tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.dataprep.blocks import count_tokens, sides, sort_rows
from headrace.dataprep.job import Job
from headrace.dataprep.task_runner import temporary
from headrace.dataprep.workspace import read_marker, rows_path, work_folder, write_marker
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.manifest import RowGroupRecord, ShardRecord
from headrace.schemas.publish import rename_durably
from headrace.schemas.shard_format import (
    TOKEN_COLUMNS,
    TRAIN,
    parquet_options,
    shard_file_name,
    shard_schema,
)

KEYS = 1 << 64
GATHERED_TOKENS = 1 << 24  # rows of about 64 MiB of ids are sorted at once


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: number `index` of `count` of its split, from the rows of `tasks` tasks.

    `work_key` identifies those rows; `split_tokens` only decides how many are gathered at once.
    """

    split: str
    index: int
    count: int
    tasks: int
    split_tokens: int
    work_key: str

    @property
    def file(self) -> str:
        """The shard's file name."""
        return shard_file_name(self.split, self.index)

    @property
    def size(self) -> int:
        """Its share of the tokens."""
        return self.split_tokens // self.count

    def key_ranges(self) -> Iterator[tuple[int, int]]:
        """The shard's keys [low, high), cut so that each part's rows fit in memory."""
        low, high = KEYS * self.index // self.count, KEYS * (self.index + 1) // self.count
        parts = max(1, self.size // GATHERED_TOKENS)
        for part in range(parts):
            yield low + (high - low) * part // parts, low + (high - low) * (part + 1) // parts


def finished_shard(job: Job, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that an earlier run finished and that still lies there, or None."""
    record = read_marker(job.output, plan.file, plan.work_key, ShardRecord)
    path = job.output / plan.file
    whole = record is not None and path.is_file() and path.stat().st_size == record.bytes
    return record if whole else None


def write_shard(job: Job, plan: ShardPlan) -> ShardRecord:
    """Gather, sort and publish one shard; its bytes depend on the rows alone."""
    path = job.output / plan.file
    unfinished = temporary(work_folder(job.output) / plan.file)
    rows_in_group = max(1, job.config.row_group_tokens // job.config.sequence_len)
    batches = list(open_batches(job.output, plan))
    schema = shard_schema(job.config.kind)
    with pq.ParquetWriter(unfinished, schema, **parquet_options(job.config.kind)) as writer:
        rest = schema.empty_table()
        for low, high in plan.key_ranges():
            rows = pa.concat_tables([rest, gather(schema, batches, low, high)]).combine_chunks()
            whole = rows.num_rows - rows.num_rows % rows_in_group
            for start in range(0, whole, rows_in_group):
                writer.write_table(rows.slice(start, rows_in_group).combine_chunks())
            rest = rows.slice(whole)
        if rest.num_rows:
            writer.write_table(rest.combine_chunks())
    record = describe_shard(unfinished, plan)
    rename_durably(unfinished, path)
    write_marker(job.output, plan.file, plan.work_key, record)
    return record


def open_batches(output: Path, plan: ShardPlan) -> Iterator[pa.RecordBatch]:
    """The sorted batches of all tasks, in task order, mapped and not read."""
    for task in range(plan.tasks):
        path = rows_path(output, task, plan.split)
        if path.is_file():
            with pa.memory_map(str(path)) as file:  # the mapping outlives the descriptor
                reader = pa.ipc.open_file(file)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)


def gather(schema: pa.Schema, batches: list[pa.RecordBatch], low: int, high: int) -> pa.Table:
    """The rows with keys in [low, high), in key order."""
    tables = [schema.empty_table()]
    for batch in batches:
        keys = batch.column("row_key").to_numpy()
        start = int(np.searchsorted(keys, np.uint64(low)))
        end = len(keys) if high >= KEYS else int(np.searchsorted(keys, np.uint64(high)))
        if end > start:
            tables.append(pa.Table.from_batches([batch.slice(start, end - start)]))
    return sort_rows(tables)


def describe_shard(path: Path, plan: ShardPlan) -> ShardRecord:
    """The manifest's record of a written file, its counts read back from it."""
    groups: list[RowGroupRecord] = []
    trained = 0
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            names = [name for name in file.schema_arrow.names if name in TOKEN_COLUMNS]
            rows = file.read_row_group(index, columns=names)
            groups.append(describe_row_group(file.metadata.row_group(index), rows))
            trained += count_trained(rows)
    return ShardRecord(
        file=plan.file,
        split="train" if plan.split == TRAIN else "evaluation",
        rows=sum(group.rows for group in groups),
        tokens=sum(group.tokens for group in groups),
        trained_tokens=trained,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        row_groups=groups,
    )


def describe_row_group(group: pq.RowGroupMetaData, rows: pa.Table) -> RowGroupRecord:
    """Rows, tokens and place of one row group; its columns lie one after another."""
    columns = [group.column(index) for index in range(group.num_columns)]
    return RowGroupRecord(
        rows=group.num_rows,
        tokens=count_tokens(rows),
        byte_offset=min(c.dictionary_page_offset or c.data_page_offset for c in columns),
        bytes=sum(column.total_compressed_size for column in columns),
    )


def count_trained(rows: pa.Table) -> int:
    """Tokens with a loss, of both sides of a pair."""
    return sum(count_marked(rows[ids], rows[mask]) for ids, mask in sides(rows))


def count_marked(ids: pa.ChunkedArray, mask: pa.ChunkedArray) -> int:
    """All tokens of rows without a mask, the marked ones of rows with one."""
    unmasked = ids.filter(pc.is_null(mask))
    marked = sum(pc.sum(chunk.flatten()).as_py() or 0 for chunk in mask.chunks)
    return sum(len(chunk.flatten()) for chunk in unmasked.chunks) + marked
