"""Batches with pictures: decoded, normalized and cut into patches where rows are laid out.

By several threads, as unpacking and copying pictures leave Python's lock alone: of a row with two
pictures of 1,024 x 768 one core makes its inputs in about 0.2 s, a GPU trains a 7B model on it in
0.3 s.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.schemas.errors import DataError
from headrace.trainer import devices
from headrace.trainer.batches.answer_batch import mismatched_rows
from headrace.trainer.batches.batch import Batch, make_batch
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_pairs import SIDES, Pair
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.vision.inputs import VisionInputs
from headrace.trainer.vision.pictures import Picture
from headrace.trainer.vision.processor import Processor

MOST_THREADS = 8


def make_vision_batch(
    micro_batches: Sequence[Sequence[Sequence[Row | Pair]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
    *,
    processor: Processor,
    lay_out: Callable[..., Batch] = make_batch,
) -> Batch:
    """Lay rows out with their pictures. Labels that are placeholders are not trained.

    Args:
        lay_out: makes the batch without pictures; of pairs and answers too.

    Raises:
        DataError: a picture that cannot be decoded, or that its row has no tokens for.
    """
    batch = lay_out(micro_batches, length, position, overlong)
    rows = [
        sequences_of(places, mismatched=extras.mismatched)
        for places, extras in zip(micro_batches, batch.extras, strict=True)
    ]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        vision = pictures_of_step(threads, batch, rows, length, processor)
    extras = [
        replace(part, vision=inputs) for part, inputs in zip(batch.extras, vision, strict=True)
    ]
    return without_placeholders(replace(batch, extras=extras), processor.placeholder)


def sequences_of(places: Sequence[Sequence[Any]], *, mismatched: bool) -> list[list[Row]]:
    """Return the rows of each sequence of a micro-batch: of pairs, chosen ones before rejected."""
    if any(isinstance(row, Pair) for place in places for row in place):
        return [[pair[side] for pair in place] for side in range(SIDES) for place in places]
    return [*map(list, places), *(mismatched_rows(places) if mismatched else ())]


def without_placeholders(batch: Batch, placeholder: int) -> Batch:
    """Return the batch with labels that are placeholders taken out of it and its counts."""
    lost = batch.labels == placeholder
    half = lost.shape[1] // 2
    counted = lost[:, :half] if batch.extras[0].mismatched else lost
    chosen = lost[:, :half] if batch.pair_rows is not None else lost[:, :0]
    return replace(
        batch,
        labels=batch.labels.masked_fill(lost, IGNORED_LABEL),
        trained_tokens=batch.trained_tokens - int(counted.sum()),
        chosen_tokens=batch.chosen_tokens - int(chosen.sum()),
    )


def pictures_of_step(
    threads: Executor,
    batch: Batch,
    micro_batches: Sequence[Sequence[Sequence[Row]]],
    length: int,
    processor: Processor,
) -> list[VisionInputs]:
    """Return the pictures of each micro-batch, in memory that a GPU can read from.

    Those that several rows share, as both sides of a pair do, are decoded once.
    """
    rows = [row for sequences in micro_batches for rows in sequences for row in rows]
    alone = {id(row.images): row for row in reversed(rows)}  # the first of those that share
    decode = partial(decoded, length=length, processor=processor)
    pictures = dict(zip(alone, threads.map(decode, alone.values()), strict=True))
    found = [
        [[picture for row in rows for picture in pictures[id(row.images)]] for rows in sequences]
        for sequences in micro_batches
    ]
    ids = [part.numpy() for part in batch.input_ids]
    made = threads.map(processor.inputs, ids, batch.document_lengths, found)
    return [inputs.through(devices.pin) for inputs in made]


def decoded(row: Row, length: int, processor: Processor) -> list[Picture]:
    """Return the pictures of a row.

    Raises:
        DataError: it is longer than a sequence, which would cut its pictures off.
    """
    what = f"{row.source}, row {row.row_key}"
    if len(row.input_ids) > length and row.images:
        raise DataError(f"{what}: has pictures and more than {length} tokens; prepare shorter rows")
    return processor.decode(row.images, what)
