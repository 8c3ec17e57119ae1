"""Classes of documents, which decide the direction in which control adapters push each token."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.schemas.fingerprint import derive_seeds
from headrace.trainer.batches.batch import Batch, cut, make_batch
from headrace.trainer.batches.extras import Extras
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row

UNSAID = 1  # class of rows whose source has none


def make_controlled_batch(
    micro_batches: Sequence[Sequence[Sequence[Row]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
    *,
    seed: int,
) -> Batch:
    """`make_batch` with `control_classes`.

    A token has the class of the document whose next token it is to predict; where there is none,
    or it is not trained, the class is 0 and nothing is pushed.
    """
    batch = make_batch(micro_batches, length, position, overlong)
    classes = np.zeros(batch.labels.shape, np.int8)
    for places, of_micro_batch in zip(micro_batches, classes, strict=True):
        for place, of_place in zip(places, of_micro_batch, strict=True):
            rows = [classes_of_row(row, length, seed) for row in place]
            if rows:
                joined = np.concatenate(rows)
                of_place[: len(joined)] = joined
    classes[batch.labels.numpy() == IGNORED_LABEL] = 0
    extras = [
        Extras(control_classes=of_micro_batch) for of_micro_batch in torch.from_numpy(classes)
    ]
    return replace(batch, extras=extras)


def classes_of_row(row: Row, length: int, seed: int) -> NDArray[np.int8]:
    """[tokens] -1 or 1. In rows of class 0 each document is pushed one way or the other by chance:
    the same in every epoch and layout, and of neighbors one tells nothing of the other.
    """
    row = cut(row, length)
    documents = len(row.document_lengths)
    control_class = UNSAID if row.control_class is None else row.control_class
    classes = np.full(documents, control_class, np.int8)
    if control_class == 0:
        drawn = islice(derive_seeds(seed, "control class", row.row_key), documents)
        classes[:] = [1 if number & 1 else -1 for number in drawn]
    return np.repeat(classes, row.document_lengths)
