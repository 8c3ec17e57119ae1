"""The passes over the whole corpus that find duplicates, before rows are packed."""

from dataclasses import replace
from functools import partial

from rich.console import Console

from headrace.dataprep.console_report import progress_bar
from headrace.dataprep.duplicates import (
    describe_corpus,
    encode_task,
    finished_encoding,
    finished_part,
    search_part,
)
from headrace.dataprep.job import Job
from headrace.dataprep.local_engine import Engine
from headrace.dataprep.task_progress import TaskBar
from headrace.dataprep.tasks import Task


def find_duplicates(job: Job, tasks: list[Task], engine: Engine, console: Console) -> Job:
    """Tokenize everything and find what repeats; the job then packs without it.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    encoded = {task.number: done for task in tasks if (done := finished_encoding(job, task))}
    todo = [task for task in tasks if task.number not in encoded]
    with TaskBar(console, "tokenize", job.output, todo) as bar:
        for task, result in engine.run(partial(encode_task, job), todo):
            encoded[task.number] = result
            bar.finish(task, result.documents, result.tokens)
    job = replace(job, corpus=describe_corpus(job, tasks, [encoded[task.number] for task in tasks]))
    search(job, engine, console)
    return job


def search(job: Job, engine: Engine, console: Console) -> None:
    """Search all parts of the keys that were not searched by an earlier run."""
    assert job.corpus is not None
    done = {part: found for part in range(job.corpus.parts) if (found := finished_part(job, part))}
    todo = [part for part in range(job.corpus.parts) if part not in done]
    with progress_bar(console) as progress:
        bar = progress.add_task("compare ", total=len(todo), counts="")
        for part, found in engine.run(partial(search_part, job), todo):
            done[part] = found
            progress.update(bar, advance=1)
