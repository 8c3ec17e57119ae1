"""Documents that repeat an earlier one, found in bounded memory, the same for any engine.

Before rows can be packed, every document of the corpus must have been seen. So tasks are tokenized
to disk, with the keys of their documents; parts of the range of keys are searched one by one for
keys that came before; then tasks are packed from disk, without the documents that were found. A
document is a duplicate if an earlier one, in the order of the inputs, has one of its keys.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes.duplicate_keys import KEY, Keys, algorithm, document_keys
from headrace.dataprep.passes.encoded_tasks import (
    EncodedTask,
    duplicates_path,
    encoded_name,
    encoded_path,
    finished_encoding,
    own_duplicates_path,
    place,
)
from headrace.dataprep.rows.blocks import encode_block, read_blocks, settle
from headrace.dataprep.rows.encoded_spool import EncodedBlock, write_encoded
from headrace.dataprep.rows.evaluation_sets import open_sets
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.work.context import Context, Corpus, check_unchanged
from headrace.dataprep.work.local_engine import Engine
from headrace.dataprep.work.reporter import Reporter
from headrace.dataprep.work.task_progress import TaskBar, write_note
from headrace.dataprep.work.workspace import Workspace, read_marker, work_folder, write_marker
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import rename_durably

ALL_KEYS = 1 << 64
NO_KEYS = np.empty(0, KEY)  # of a task without a document
DUPLICATE = np.dtype([("task", "<u4"), ("document", "<u4"), ("kind", "u1")])


def find_duplicates(
    context: Context, tasks: list[Task], engine: Engine, reporter: Reporter
) -> Context:
    """Tokenize everything and find what repeats; the job then packs without it.

    Raises:
        DataError: an input is damaged, or changed since the work was planned.
    """
    encoded = {task.number: done for task in tasks if (done := finished_encoding(context, task))}
    todo = [task for task in tasks if task.number not in encoded]
    with TaskBar(reporter, "tokenize", context.space, todo) as bar:
        for task, result in engine.run(partial(encode_task, context), todo):
            encoded[task.number] = result
            bar.finish(task, result.documents, result.tokens)
    context = replace(
        context, corpus=describe_corpus(context, tasks, [encoded[task.number] for task in tasks])
    )
    search(context, engine, reporter)
    return context


def search(context: Context, engine: Engine, reporter: Reporter) -> None:
    """Search all parts of the keys that were not searched by an earlier run."""
    assert context.corpus is not None
    done = {
        part: found
        for part in range(context.corpus.parts)
        if (found := finished_part(context, part))
    }
    todo = [part for part in range(context.corpus.parts) if part not in done]
    with reporter.bar("compare ", len(todo)) as bar:
        results = engine.run(partial(search_part, context), todo)
        for searched, (part, found) in enumerate(results, start=1):
            done[part] = found
            bar.update(searched)


def keys_path(output: Path, task: int) -> Path:
    """The keys of a task's documents, sorted."""
    return work_folder(output) / f"task-{task:06d}.keys.npy"


def encode_task(context: Context, task: Task) -> EncodedTask:
    """Tokenize one task to disk, with the sorted keys of its documents."""
    keys: list[Keys] = []
    counts = {"documents": 0, "tokens": 0}

    def encode_blocks() -> Iterator[EncodedBlock]:
        row_format = context.row_format(task.source)
        sets = open_sets(context.config.decontaminate)
        for block in read_blocks(context.config, row_format, task):
            documents, rejects = encode_block(context.config, row_format, sets, block)
            keys.append(find_keys(context, counts["documents"], documents))
            counts["documents"] += len(documents)
            counts["tokens"] += sum(
                sample.tokens for document in documents for sample in document.samples
            )
            write_note(context.space, task.number, **counts)
            yield settle(context.config, block, documents, rejects)

    path = encoded_path(context.output, task.number)
    unfinished = context.space.temporary(path)
    write_encoded(unfinished, encode_blocks())
    check_unchanged(task)
    rename_durably(unfinished, path)
    result = EncodedTask(keys=save_keys(context, task, np.concatenate([NO_KEYS, *keys])), **counts)
    write_marker(context.space, encoded_name(task), context.task_key(task), result)
    return result


def save_keys(context: Context, task: Task, keys: Keys) -> int:
    """Write each of a task's keys once, and apart the documents that repeat one; count the keys."""
    first, later = split_later(keys)
    save(context.space, keys_path(context.output, task.number), keys[first])
    owners = np.full(len(later), task.number, np.uint32)
    save(
        context.space,
        own_duplicates_path(context.output, task.number),
        duplicates(owners, keys[later]),
    )
    return len(first)


def find_keys(context: Context, first: int, documents: list[Encoded]) -> Keys:
    """The keys of a block's documents that are still there, numbered in the task from `first`."""
    numbers = [first + place for place, document in enumerate(documents) if document.samples]
    contents = [document.content for document in documents if document.samples]
    return document_keys(context.config.deduplicate, numbers, contents)


def describe_corpus(context: Context, tasks: list[Task], encoded: list[EncodedTask]) -> Corpus:
    """Describe all documents together: the key of the duplicates, and the number of parts."""
    task_keys = [context.task_key(task) for task in tasks]
    parts = max(1, -(-sum(task.keys for task in encoded) // context.space.budgets.keys_in_part))
    key = fingerprint([task_keys, algorithm(context.config.deduplicate)])
    return Corpus(key=key, tasks=len(tasks), parts=parts)


def finished_part(context: Context, part: int) -> "Found | None":
    """Return the duplicates that an earlier run found in one part, or None."""
    return read_marker(context.output, part_name(part), part_key(context), Found)


class Found(BaseModel):
    """Duplicates in one part of the keys; a document may be found in several parts."""

    duplicates: int


def part_name(part: int) -> str:
    """The name of a searched part's marker."""
    return f"duplicates-{part:05d}"


def part_key(context: Context) -> str:
    """Return the key of the work that finds duplicates."""
    assert context.corpus is not None
    return fingerprint([context.corpus.key, context.corpus.parts])


def search_part(context: Context, part: int) -> Found:
    """Find the documents that have a key of an earlier one, in one part of the range of keys."""
    assert context.corpus is not None
    parts = context.corpus.parts
    low, high = ALL_KEYS * part // parts, ALL_KEYS * (part + 1) // parts
    pieces = [gather(context.output, task, low, high) for task in range(context.corpus.tasks)]
    owners = np.repeat(np.arange(len(pieces), dtype=np.uint32), [len(keys) for keys in pieces])
    keys = np.concatenate(pieces)
    _, later = split_later(keys)
    found = duplicates(owners[later], keys[later])
    save(context.space, duplicates_path(context.output, part), found)
    result = Found(duplicates=len(found))
    write_marker(context.space, part_name(part), part_key(context), result)
    return result


def gather(output: Path, task: int, low: int, high: int) -> Keys:
    """The keys of a task in [low, high)."""
    keys = np.load(keys_path(output, task), mmap_mode="r")
    return np.array(keys[place(keys["key"], low) : place(keys["key"], high)])


def split_later(keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The places of the first of all equal keys, in the order of keys; and of all others."""
    order = np.lexsort((keys["check"], keys["key"]))  # stable: equal keys stay in input order
    ordered = keys[order]
    new = np.ones(len(keys), np.bool_)
    new[1:] = (ordered["key"][1:] != ordered["key"][:-1]) | (
        ordered["check"][1:] != ordered["check"][:-1]
    )
    return order[new], order[~new]


def duplicates(owners: npt.NDArray[np.uint32], keys: Keys) -> npt.NDArray[np.void]:
    """The documents of some keys, each with its task, sorted."""
    found = np.empty(len(keys), DUPLICATE)
    found["task"], found["document"], found["kind"] = owners, keys["document"], keys["kind"]
    return np.unique(found)


def save(space: Workspace, path: Path, values: npt.NDArray[np.void]) -> None:
    """Publish an array."""
    unfinished = space.temporary(path)
    with unfinished.open("wb") as file:
        np.save(file, values)
    rename_durably(unfinished, path)
