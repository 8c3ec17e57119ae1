"""A task from input to sorted rows on disk: bounded memory, its marker written last."""

import json
from collections.abc import Iterator

from headrace.dataprep.blocks import BlockRows, pack_block, process_block, read_blocks
from headrace.dataprep.duplicates import unique_blocks
from headrace.dataprep.formats.registry import build_format
from headrace.dataprep.job import Job, check_unchanged
from headrace.dataprep.mixing import MixedTask, mixed_blocks
from headrace.dataprep.records import Reject
from headrace.dataprep.runs import Spool
from headrace.dataprep.task_progress import write_note
from headrace.dataprep.task_stats import StatsSum, TaskStats
from headrace.dataprep.tasks import Task
from headrace.dataprep.workspace import (
    read_marker,
    rejects_path,
    rows_path,
    write_marker,
)
from headrace.schemas.publish import rename_together
from headrace.schemas.shard_format import SPLITS, shard_schema


def finished_task(job: Job, task: Task) -> TaskStats | None:
    """The counts of a task that an earlier run finished, or None."""
    return read_marker(job.output, task_name(task), job.task_key(task), TaskStats)


def run_task(job: Job, task: Task) -> TaskStats:
    """Read, tokenize, pack and write one task; what it leaves depends on its arguments alone.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    rejects = rejects_path(job.output, task.number)
    unfinished = job.space.temporary(rejects)
    schema = shard_schema(job.config.kind)
    spools = {
        split: Spool(job.space, rows_path(job.output, task.number, split), schema)
        for split in SPLITS
    }
    total = StatsSum()
    with unfinished.open("w", encoding="utf-8") as lines:
        for result in process_blocks(job, task):
            for split, rows in result.rows.items():
                spools[split].add(rows, result.stats.tokens[split])
            lines.writelines(reject_line(result.source, reject) for reject in result.rejects)
            total.add(result.stats)
            numbers = total.numbers
            write_note(job.space, task.number, numbers["documents"], numbers["tokens_in"])
    check_unchanged(task)
    if (first := finished_task(job, task)) is not None:
        return first  # another attempt's; its files may be in use by now
    rename_together([*(spool.close() for spool in spools.values()), (unfinished, rejects)])
    stats = total.total()
    write_marker(job.space, task_name(task), job.task_key(task), stats)
    return stats


def process_blocks(job: Job, task: Task) -> Iterator[BlockRows]:
    """The rows of each block of a task, from its input, or tokenized already to find duplicates."""
    if isinstance(task, MixedTask):
        yield from mixed_blocks(job, task)
        return
    if job.corpus is not None:
        yield from (
            pack_block(job.config, job.tokenizer, block) for block in unique_blocks(job, task)
        )
        return
    row_format = build_format(job.config, task.source, job.tokenizer)
    for block in read_blocks(job.config, row_format, task):
        yield process_block(job.config, job.tokenizer, row_format, block)


def task_name(task: Task) -> str:
    """The name of a task's marker."""
    return f"task-{task.number:06d}"


def reject_line(source: str, reject: Reject) -> str:
    """One line of `rejects.jsonl`."""
    return json.dumps({"source": source, **reject._asdict()}, ensure_ascii=False) + "\n"
