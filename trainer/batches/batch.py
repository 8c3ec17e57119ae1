"""Batches that a step is fed with: micro-batches of fixed shape, labels, document boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.batches.extras import Extras
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_pairs import Pair
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.shards.packed_rows import PackedRow


@dataclass(frozen=True)
class Batch:
    """One replica's share of a global batch: m micro-batches of b places of s tokens.

    A place holds one row, or several one after the other. It is filled up with one more document
    that no token of a row can see and that is not trained. A place without a row (the last batch of
    a run) holds such padding only.

    Of preference sets, places [0, b/2) of a micro-batch hold chosen answers and the other half the
    rejected ones of the same pairs; `rows` then has a place for both. So it has of single answers
    with a baseline, where the other half holds mismatched ones.
    """

    input_ids: Tensor  # [m, b, s] int32; 64 bits wide on the device only
    labels: Tensor  # [m, b, s] int32: the next token of the same document, or IGNORED_LABEL
    document_lengths: list[list[list[int]]]  # [m][b] lengths that sum to s
    rows: list[list[list[PackedRow]]]  # [m][b] rows in the order of their tokens
    trained_tokens: int
    position: Position  # after the global batch
    overlong: OverlongCount  # met in looking for the rows of the global batch
    row_lengths: list[list[int]]  # [m][b] real tokens of each place; padding follows them
    extras: list[Extras]  # [m]
    pair_rows: list[list[list[Pair]]] | None = None  # the pairs themselves, as `rows`
    chosen_tokens: int = 0  # trained tokens of chosen answers

    @property
    def tokens(self) -> int:
        """Tokens of the rows; padding is left out, and so are mismatched answers."""
        placed = chain.from_iterable(chain.from_iterable(self.rows))
        return sum(row.tokens for row in placed)


def make_batch(
    micro_batches: Sequence[Sequence[Sequence[Row]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
) -> Batch:
    """Lay rows out as tensors.

    Args:
        micro_batches: [m][b] the rows of each place; none where the global batch has no row left.
        length: tokens of a place. Its rows have at most as many, or it is a single row, which is
            cut.
    """
    cut_rows = [[[cut(row, length) for row in rows] for rows in places] for places in micro_batches]
    ids = np.empty((len(cut_rows), len(cut_rows[0]), length), dtype=np.int32)
    document_lengths = [
        [write_ids(rows, cells) for rows, cells in zip(places, of_places, strict=True)]
        for places, of_places in zip(cut_rows, ids, strict=True)
    ]
    labels = labels_of(ids, document_lengths)
    for places, of_places in zip(cut_rows, labels, strict=True):
        for rows, cells in zip(places, of_places, strict=True):
            ignore_masked(rows, cells)
    placed = [
        [[packed_row(row, length) for row in place] for place in places] for places in cut_rows
    ]
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        document_lengths=document_lengths,
        rows=placed,
        row_lengths=[[sum(row.tokens for row in place) for place in places] for places in placed],
        trained_tokens=int(np.count_nonzero(labels != IGNORED_LABEL)),
        position=position,
        overlong=overlong,
        extras=[Extras() for _ in cut_rows],
    )


def packed_row(row: Row, length: int) -> PackedRow:
    """Return the record of a row in a sequence of `length` tokens."""
    return PackedRow(row.source, row.row_key, min(len(row.input_ids), length))


def write_ids(rows: Sequence[Row], ids: NDArray[np.int32]) -> list[int]:
    """Write the rows of one place one after the other, and zeros after them.

    Returns:
        Its document lengths, which sum to the place.
    """
    start = 0
    lengths: list[int] = []
    for row in rows:
        stop = start + len(row.input_ids)
        ids[start:stop] = row.input_ids
        lengths += row.document_lengths.tolist()
        start = stop
    if start < len(ids):
        ids[start:] = 0
        lengths.append(len(ids) - start)
    return lengths


def labels_of(ids: NDArray[np.int32], lengths: list[list[list[int]]]) -> NDArray[np.int32]:
    """[m, b, s] the next token of the same document, whether it is a row's or padding."""
    labels = np.empty_like(ids)
    flat = labels.reshape(-1)
    flat[:-1] = ids.reshape(-1)[1:]
    documents = chain.from_iterable(chain.from_iterable(lengths))
    flat[np.cumsum(np.fromiter(documents, np.int64)) - 1] = IGNORED_LABEL
    return labels


def ignore_masked(rows: Sequence[Row], labels: NDArray[np.int32]) -> None:
    """Take the tokens of one place that are not to be trained out of its labels."""
    start = 0
    for row in rows:
        stop = start + len(row.input_ids)
        if row.loss_mask is not None:
            np.putmask(labels[start : stop - 1], ~row.loss_mask[1:], IGNORED_LABEL)
        start = stop
    labels[start:] = IGNORED_LABEL


def cut(row: Row, tokens: int) -> Row:
    """The first tokens of a row, or all."""
    if len(row.input_ids) <= tokens:
        return row
    ends = np.minimum(np.cumsum(row.document_lengths), tokens)
    lengths = np.diff(ends, prepend=0)
    return row._replace(
        input_ids=row.input_ids[:tokens],
        loss_mask=None if row.loss_mask is None else row.loss_mask[:tokens],
        document_lengths=lengths[lengths > 0],
    )
