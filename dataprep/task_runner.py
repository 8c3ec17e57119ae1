"""A task from input to sorted rows on disk: bounded memory, its marker written last."""

import json
from pathlib import Path

import pyarrow as pa

from headrace.dataprep.blocks import process_block, read_blocks, sort_rows
from headrace.dataprep.formats.registry import build_format
from headrace.dataprep.job import Job, changed
from headrace.dataprep.records import Reject
from headrace.dataprep.task_stats import TaskStats, add_stats
from headrace.dataprep.tasks import Task
from headrace.dataprep.workspace import read_marker, rejects_path, rows_path, write_marker
from headrace.schemas.errors import DataError
from headrace.schemas.publish import rename_durably
from headrace.schemas.shard_format import SPLITS, shard_schema

HELD_TOKENS = 1 << 24  # 64 MiB of ids are sorted and written at once


def finished_task(job: Job, task: Task) -> TaskStats | None:
    """The counts of a task that an earlier run finished, or None."""
    return read_marker(job.output, task_name(task), job.task_key(task), TaskStats)


def run_task(job: Job, task: Task) -> TaskStats:
    """Read, tokenise, pack and write one task; what it leaves depends on its arguments alone.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    row_format = build_format(job.config, task.source, job.tokenizer)
    rejects = rejects_path(job.output, task.number)
    schema = shard_schema(job.config.kind)
    spools = {s: Spool(rows_path(job.output, task.number, s), schema) for s in SPLITS}
    total = TaskStats()
    with temporary(rejects).open("w", encoding="utf-8") as lines:
        for block in read_blocks(job.config, row_format, task):
            result = process_block(job.config, job.tokenizer, row_format, block)
            for split, rows in result.rows.items():
                spools[split].add(rows, result.stats.tokens[split])
            lines.writelines(reject_line(task.source.name, reject) for reject in result.rejects)
            total = add_stats((total, result.stats))
    check_unchanged(task)
    for spool in spools.values():
        spool.publish()
    rename_durably(temporary(rejects), rejects)
    write_marker(job.output, task_name(task), job.task_key(task), total)
    return total


class Spool:
    """The rows of one split of a task, sorted by key and written in a few large batches."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.held: list[pa.Table] = []
        self.held_tokens = 0
        self.writer: pa.RecordBatchFileWriter | None = None

    def add(self, rows: pa.Table, tokens: int) -> None:
        """Take one block's rows."""
        self.held.append(rows)
        self.held_tokens += tokens
        if self.held_tokens >= HELD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one sorted batch."""
        if self.writer is None:
            self.writer = pa.ipc.new_file(str(temporary(self.path)), self.schema)
        self.writer.write_table(sort_rows(self.held))
        self.held, self.held_tokens = [], 0

    def publish(self) -> None:
        """Put the file in its place; a task without rows in the split leaves none."""
        if self.held:
            self.flush()
        if self.writer is None:
            self.path.unlink(missing_ok=True)
            return
        self.writer.close()
        rename_durably(temporary(self.path), self.path)


def task_name(task: Task) -> str:
    """The name of a task's marker."""
    return f"task-{task.number:06d}"


def temporary(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def reject_line(source: str, reject: Reject) -> str:
    """One line of `rejects.jsonl`."""
    return json.dumps({"source": source, **reject._asdict()}, ensure_ascii=False) + "\n"


def check_unchanged(task: Task) -> None:
    """Refuse rows of which part may come from another version of a file."""
    for piece in task.pieces:
        if changed(piece.file):
            raise DataError(f"{piece.file.path}: changed while it was read; run again")
