"""Batches with pictures: decoded, normalized and cut into patches where rows are laid out."""

from collections.abc import Sequence
from dataclasses import replace

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.schemas.errors import DataError
from headrace.trainer.batches.batch import Batch, make_batch
from headrace.trainer.batches.extras import Extras
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.vision.inputs import VisionInputs
from headrace.trainer.vision.pictures import Picture
from headrace.trainer.vision.processor import Processor


def make_vision_batch(
    micro_batches: Sequence[Sequence[Sequence[Row]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
    *,
    processor: Processor,
) -> Batch:
    """`make_batch` with the pictures of the rows. Labels that are placeholders are not trained.

    Raises:
        DataError: a picture that cannot be decoded, or that its row has no tokens for.
    """
    batch = make_batch(micro_batches, length, position, overlong)
    labels = batch.labels.masked_fill(batch.labels == processor.placeholder, IGNORED_LABEL)
    vision = [
        inputs_of(batch, number, places, length, processor)
        for number, places in enumerate(micro_batches)
    ]
    return replace(
        batch,
        labels=labels,
        trained_tokens=int((labels != IGNORED_LABEL).sum()),
        extras=[Extras(vision=inputs) for inputs in vision],
    )


def inputs_of(
    batch: Batch, number: int, places: Sequence[Sequence[Row]], length: int, processor: Processor
) -> VisionInputs:
    """Return the pictures of one micro-batch."""
    pictures = [[p for row in rows for p in decoded(row, length, processor)] for rows in places]
    ids, lengths = batch.input_ids[number].numpy(), batch.document_lengths[number]
    return processor.inputs(ids, lengths, pictures)


def decoded(row: Row, length: int, processor: Processor) -> list[Picture]:
    """Return the pictures of a row.

    Raises:
        DataError: it is longer than a sequence, which would cut its pictures off.
    """
    what = f"{row.source}, row {row.row_key}"
    if len(row.input_ids) > length and row.images:
        raise DataError(f"{what}: has pictures and more than {length} tokens; prepare shorter rows")
    return processor.decode(row.images, what)
