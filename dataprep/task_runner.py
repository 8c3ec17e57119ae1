"""A task from input to sorted rows on disk: bounded memory, its marker written last."""

import json

from headrace.dataprep.blocks import process_block, read_blocks
from headrace.dataprep.formats.registry import build_format
from headrace.dataprep.job import Job, changed
from headrace.dataprep.records import Reject
from headrace.dataprep.runs import Spool
from headrace.dataprep.task_stats import StatsSum, TaskStats
from headrace.dataprep.tasks import Task
from headrace.dataprep.workspace import read_marker, rejects_path, rows_path, write_marker
from headrace.schemas.errors import DataError
from headrace.schemas.publish import rename_durably
from headrace.schemas.shard_format import SPLITS, shard_schema


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
    unfinished = job.space.temporary(rejects)
    schema = shard_schema(job.config.kind)
    spools = {
        split: Spool(job.space, rows_path(job.output, task.number, split), schema)
        for split in SPLITS
    }
    total = StatsSum()
    with unfinished.open("w", encoding="utf-8") as lines:
        for block in read_blocks(job.config, row_format, task):
            result = process_block(job.config, job.tokenizer, row_format, block)
            for split, rows in result.rows.items():
                spools[split].add(rows, result.stats.tokens[split])
            lines.writelines(reject_line(task.source.name, reject) for reject in result.rejects)
            total.add(result.stats)
    check_unchanged(task)
    if (first := finished_task(job, task)) is not None:
        return first  # another attempt's; its files may be in use by now
    for spool in spools.values():
        spool.publish()
    rename_durably(unfinished, rejects)
    stats = total.total()
    write_marker(job.space, task_name(task), job.task_key(task), stats)
    return stats


def task_name(task: Task) -> str:
    """The name of a task's marker."""
    return f"task-{task.number:06d}"


def reject_line(source: str, reject: Reject) -> str:
    """One line of `rejects.jsonl`."""
    return json.dumps({"source": source, **reject._asdict()}, ensure_ascii=False) + "\n"


def check_unchanged(task: Task) -> None:
    """Refuse rows of which part may come from another version of a file."""
    for piece in task.pieces:
        if changed(piece.file):
            raise DataError(f"{piece.file.path}: changed while it was read; run again")
