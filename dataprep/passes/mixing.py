"""Rows that hold documents of several sources: `mix_sources`.

Tasks are tokenized to disk first. Mixed block b of B then takes part b of B of the documents of
each source, so that all blocks have the same mixture, puts them in a random order, and packs them.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import numpy as np

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes.encoded_tasks import encoded_path, finished_encoding, unique_blocks
from headrace.dataprep.rows.encoded_spool import EncodedBlock, read_encoded
from headrace.dataprep.rows.pack_blocks import BlockRows, mask_sample, masked_ids, pack_block
from headrace.dataprep.rows.task_stats import TaskStats
from headrace.dataprep.text.row_format import Document
from headrace.dataprep.work.context import Context
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import derive_seeds
from headrace.schemas.prepare.prepare_config import MIXED
from headrace.schemas.prepare.source_config import SourceConfig


@dataclass(frozen=True)
class Stream:
    """Successive documents of one source, so many for each mixed block of a task.

    They begin with document `skip` of the first of `tasks`.
    """

    source: str
    masked: tuple[int, ...]
    tasks: tuple[Task, ...]
    skip: int
    takes: tuple[int, ...]


@dataclass(frozen=True)
class MixedTask(Task):
    """Successive mixed blocks.

    Args:
        share: its part of the input bytes.
        refused: tokenized tasks whose refused records are listed with this one.
    """

    share: int = 0
    streams: tuple[Stream, ...] = ()
    refused: tuple[Task, ...] = ()

    @property
    def size(self) -> int:
        """Input bytes."""
        return self.share

    def identity(self) -> dict[str, object]:
        """Equal identities read equal documents of the same corpus."""
        streams = [[s.source, s.masked, s.skip, s.takes, len(s.tasks)] for s in self.streams]
        first = [task.number for stream in self.streams for task in stream.tasks[:1]]
        return {"mixed": [streams, first, [task.number for task in self.refused]]}


def mix(context: Context, tasks: list[Task]) -> tuple[Context, list[Task]]:
    """The job whose one source is the mixture, and its tasks, once all tasks are tokenized.

    Raises:
        DataError: a source has no documents.
    """
    total = sum(task.size for task in tasks)
    blocks = max(1, total // context.config.block_bytes)
    count = min(blocks, len(tasks))
    sources = [SourceTasks(context, source, tasks) for source in context.config.sources]
    classes = {source.control_class for source in context.config.sources}
    mixture = SourceConfig(
        name=MIXED, type="pretokenized", path=MIXED, control_class=next(iter(classes))
    )
    mixed: list[Task] = []
    for number in range(count):
        span = range(blocks * number // count, blocks * (number + 1) // count)
        streams = [source.stream(span, blocks) for source in sources]
        refused = tasks[len(tasks) * number // count : len(tasks) * (number + 1) // count]
        mixed.append(
            MixedTask(
                number,
                number,
                mixture,
                (),
                total // count,
                tuple(stream for stream in streams if sum(stream.takes)),
                tuple(map(without_pieces, refused)),
            )
        )
    return replace(context, config=context.config.model_copy(update={"sources": [mixture]})), mixed


class SourceTasks:
    """The tokenized tasks of one source, and where their documents begin."""

    def __init__(self, context: Context, source: SourceConfig, tasks: list[Task]) -> None:
        self.name = source.name
        self.masked = tuple(masked_ids(source, context.tokenizer))
        self.tasks = [task for task in tasks if task.source.name == source.name]
        encoded = [finished_encoding(replace(context, corpus=None), task) for task in self.tasks]
        self.ends = list(accumulate(done.documents for done in encoded if done))
        if not self.ends or not self.ends[-1]:
            raise DataError(
                f'source "{source.name}": no documents in {source.path}; '
                "correct the path, or remove the source"
            )

    def stream(self, span: range, blocks: int) -> Stream:
        """The documents for some of all mixed blocks."""
        bounds = [self.ends[-1] * block // blocks for block in (*span, span.stop)]
        first = bisect_right(self.ends, bounds[0])
        last = bisect_right(self.ends, max(bounds[-1] - 1, bounds[0]))
        return Stream(
            self.name,
            self.masked,
            tuple(map(without_pieces, self.tasks[first : last + 1])),
            bounds[0] - (self.ends[first - 1] if first else 0),
            tuple(np.diff(bounds).tolist()),
        )


def without_pieces(task: Task) -> Task:
    """A task that was tokenized and is not read from its input any more."""
    return replace(task, pieces=())


def mixed_blocks(context: Context, task: MixedTask) -> Iterator[BlockRows]:
    """The refused records of tokenized tasks, and the rows of each mixed block."""
    for other in task.refused:
        for block in read_encoded(encoded_path(context.output, other.number)):
            reasons = Counter(reject.reason for reject in block.rejects)
            yield BlockRows(
                block.source, {}, block.rejects, TaskStats(rejects=dict(reasons), notes=block.notes)
            )
    streams = [read_stream(context, stream) for stream in task.streams]
    for number, takes in enumerate(zip(*(s.takes for s in task.streams), strict=True)):
        parts = [list(islice(found, take)) for found, take in zip(streams, takes, strict=True)]
        documents = [document for part in parts for document in part]
        order = islice(
            derive_seeds(context.config.seed, "mix", task.number, number), len(documents)
        )
        places = np.argsort(np.fromiter(order, np.uint64), kind="stable")
        shuffled = [documents[place] for place in places]
        rows = pack_block(
            context.config,
            context.tokenizer,
            EncodedBlock(MIXED, task.number, number, shuffled, []),
        )
        brought = {
            stream.source: sum(sample.tokens for document in part for sample in document.samples)
            for stream, part in zip(task.streams, parts, strict=True)
        }
        stats = rows.stats.model_copy(update={"mixed_tokens": brought})
        yield replace(rows, stats=stats)


def read_stream(context: Context, stream: Stream) -> Iterator[Document]:
    """The documents of a stream, with what its source masks."""
    documents = (
        document
        for task in stream.tasks
        for block in unique_blocks(context, task)
        for document in block.documents
    )
    masked = list(stream.masked)
    for document in islice(documents, stream.skip, None):
        yield document._replace(
            samples=[mask_sample(sample, masked) for sample in document.samples]
        )
