"""Tokenized tasks on disk, as the search for duplicates and the mixture of sources read them."""

import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes.duplicate_keys import EXACT, NEAR
from headrace.dataprep.rows.encoded_spool import EncodedBlock, read_encoded
from headrace.dataprep.text.row_format import without_samples
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.workspace import read_marker, work_folder

REASONS = {EXACT: "exact duplicate", NEAR: "near duplicate"}


class EncodedTask(BaseModel):
    """Counts of a tokenized task."""

    documents: int
    tokens: int
    keys: int


def encoded_path(output: Path, task: int) -> Path:
    """The tokenized blocks of a task."""
    return work_folder(output) / f"task-{task:06d}.encoded.arrow"


def own_duplicates_path(output: Path, task: int) -> Path:
    """The documents of a task that repeat another one of the same task."""
    return work_folder(output) / f"task-{task:06d}.duplicates.npy"


def duplicates_path(output: Path, part: int) -> Path:
    """The duplicates found in one part of the keys, sorted by task and document."""
    return work_folder(output) / f"duplicates-{part:05d}.npy"


def encoded_name(task: Task) -> str:
    """The name of a tokenized task's marker."""
    return f"encoded-{task.number:06d}"


def finished_encoding(context: Context, task: Task) -> EncodedTask | None:
    """The counts of a task that an earlier run tokenized, or None."""
    return read_marker(context.output, encoded_name(task), context.task_key(task), EncodedTask)


def place(values: npt.NDArray[np.unsignedinteger], value: int) -> int:
    """Return the index of a value in sorted ones, without reading them all."""
    return bisect.bisect_left(range(len(values)), value, key=lambda index: int(values[index]))


def unique_blocks(context: Context, task: Task) -> Iterator[EncodedBlock]:
    """The tokenized blocks of a task; documents that were found lose their samples."""
    reasons = duplicates_of(context, task)
    first = 0
    for block in read_encoded(encoded_path(context.output, task.number)):
        documents = [
            without_samples(document, REASONS[reasons[number]]) if number in reasons else document
            for number, document in enumerate(block.documents, start=first)
        ]
        first += len(documents)
        yield block._replace(documents=documents)


def duplicates_of(context: Context, task: Task) -> dict[int, int]:
    """The duplicates of a task by their number, with their kind; exact goes before near."""
    assert context.corpus is not None
    parts = (duplicates_path(context.output, part) for part in range(context.corpus.parts))
    found: dict[int, int] = {}
    for path in (own_duplicates_path(context.output, task.number), *parts):
        rows = np.load(path, mmap_mode="r")
        low, high = (place(rows["task"], number) for number in (task.number, task.number + 1))
        for _, document, kind in rows[low:high].tolist():
            found[document] = min(kind, found.get(document, kind))
    return found
