"""The passes over the whole corpus that find duplicates, before rows are packed."""

from dataclasses import replace
from functools import partial

from rich.console import Console

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes.dedup_search import (
    describe_corpus,
    encode_task,
    finished_part,
    search_part,
)
from headrace.dataprep.passes.encoded_tasks import finished_encoding
from headrace.dataprep.work.console_report import progress_bar
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.local_engine import Engine
from headrace.dataprep.work.task_progress import TaskBar


def find_duplicates(
    context: Context, tasks: list[Task], engine: Engine, console: Console
) -> Context:
    """Tokenize everything and find what repeats; the job then packs without it.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    encoded = {task.number: done for task in tasks if (done := finished_encoding(context, task))}
    todo = [task for task in tasks if task.number not in encoded]
    with TaskBar(console, "tokenize", context.output, todo) as bar:
        for task, result in engine.run(partial(encode_task, context), todo):
            encoded[task.number] = result
            bar.finish(task, result.documents, result.tokens)
    context = replace(
        context, corpus=describe_corpus(context, tasks, [encoded[task.number] for task in tasks])
    )
    search(context, engine, console)
    return context


def search(context: Context, engine: Engine, console: Console) -> None:
    """Search all parts of the keys that were not searched by an earlier run."""
    assert context.corpus is not None
    done = {
        part: found
        for part in range(context.corpus.parts)
        if (found := finished_part(context, part))
    }
    todo = [part for part in range(context.corpus.parts) if part not in done]
    with progress_bar(console) as progress:
        bar = progress.add_task("compare ", total=len(todo), counts="")
        for part, found in engine.run(partial(search_part, context), todo):
            done[part] = found
            progress.update(bar, advance=1)
