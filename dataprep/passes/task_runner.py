"""A task from input to sorted rows on disk: bounded memory, its marker written last."""

import json
from collections.abc import Iterator

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.input.records import Reject
from headrace.dataprep.passes.encoded_tasks import unique_blocks
from headrace.dataprep.passes.mixing import MixedTask, mixed_blocks
from headrace.dataprep.passes.sorted_runs import Spool
from headrace.dataprep.rows.blocks import process_block, read_blocks
from headrace.dataprep.rows.evaluation_sets import open_sets
from headrace.dataprep.rows.pack_blocks import BlockRows, pack_block
from headrace.dataprep.rows.task_stats import StatsSum, TaskStats
from headrace.dataprep.work.context import Context, check_unchanged
from headrace.dataprep.work.local_engine import start_light
from headrace.dataprep.work.task_progress import write_note
from headrace.dataprep.work.workspace import (
    read_marker,
    rejects_path,
    rows_path,
    write_marker,
)
from headrace.schemas.publish import rename_together
from headrace.schemas.shards.shard_format import SPLITS, shard_schema


def finished_task(context: Context, task: Task) -> TaskStats | None:
    """The counts of a task that an earlier run finished, or None."""
    return read_marker(context.output, task_name(task), context.task_key(task), TaskStats)


def run_task(context: Context, task: Task) -> TaskStats:
    """Read, tokenize, pack and write one task; what it leaves depends on its arguments alone.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    if task.source.axolotl is None:  # its libraries may want pandas
        start_light()
    rejects = rejects_path(context.output, task.number)
    unfinished = context.space.temporary(rejects)
    schema = shard_schema(context.config.kind, context.config.images is not None)
    spools = {
        split: Spool(context.space, rows_path(context.output, task.number, split), schema)
        for split in SPLITS
    }
    total = StatsSum()
    with unfinished.open("w", encoding="utf-8") as lines:
        for result in process_blocks(context, task):
            for split, rows in result.rows.items():
                spools[split].add(rows, result.stats.weight(split))
            lines.writelines(reject_line(result.source, reject) for reject in result.rejects)
            total.add(result.stats)
            numbers = total.numbers
            write_note(context.space, task.number, numbers["documents"], numbers["tokens_in"])
    check_unchanged(task)
    if (first := finished_task(context, task)) is not None:
        return first  # another attempt's; its files may be in use by now
    rename_together([*(spool.close() for spool in spools.values()), (unfinished, rejects)])
    stats = total.total()
    write_marker(context.space, task_name(task), context.task_key(task), stats)
    return stats


def process_blocks(context: Context, task: Task) -> Iterator[BlockRows]:
    """The rows of each block of a task, from its input, or tokenized already to find duplicates."""
    if isinstance(task, MixedTask):
        yield from mixed_blocks(context, task)
        return
    if context.corpus is not None:
        yield from (
            pack_block(context.config, context.tokenizer, block)
            for block in unique_blocks(context, task)
        )
        return
    row_format = context.row_format(task.source)
    sets = open_sets(context.config.decontaminate)
    for block in read_blocks(context.config, row_format, task):
        yield process_block(context.config, context.tokenizer, row_format, sets, block)


def task_name(task: Task) -> str:
    """The name of a task's marker."""
    return f"task-{task.number:06d}"


def reject_line(source: str, reject: Reject) -> str:
    """One line of `rejects.jsonl`."""
    return json.dumps({"source": source, **reject.described()}, ensure_ascii=False) + "\n"
