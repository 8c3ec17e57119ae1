"""What a step is fed with: micro-batches of fixed shape, labels, document boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.data.decoded_rows import Row
from headrace.trainer.data.placed_rows import PlacedRow
from headrace.trainer.data.position import Position
from headrace.trainer.data.row_packer import OverlongCount


@dataclass(frozen=True)
class Batch:
    """One replica's share of a global batch: m micro-batches of b places of s tokens.

    A place holds one row, or several one after the other. It is filled up with one more document
    that no token of a row can see and that is not trained. A place without a row (the last batch of
    a run) holds such filling only.

    Of preference sets, places [0, b/2) of a micro-batch hold chosen answers and the other half the
    rejected ones of the same pairs; `rows` then has a place for both.
    """

    input_ids: Tensor  # [m, b, s] int64
    labels: Tensor  # [m, b, s] int64: the next token of the same document, or IGNORED_LABEL
    document_lengths: list[list[list[int]]]  # [m][b] lengths that sum to s
    rows: list[list[list[PlacedRow]]]  # [m][b] rows in the order of their tokens
    trained_tokens: int
    position: Position  # after the global batch
    overlong: OverlongCount  # met in looking for the rows of the global batch
    row_lengths: list[list[int]]  # [m][b] real tokens of each place; filling follows them
    pairs: list[list[list[tuple[int, int]]]] | None = None  # tokens of both sides, as `rows`
    chosen_tokens: int = 0  # trained tokens of chosen answers
    control_classes: Tensor | None = None  # [m, b, s] int8: -1, 0, 1

    @property
    def tokens(self) -> int:
        """Real tokens, filling left out."""
        return sum(map(sum, self.row_lengths))


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
    shape = (len(micro_batches), len(micro_batches[0]), length)
    ids, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    laid_out = [
        [lay_out(rows, *cells) for rows, *cells in zip(places, *arrays, strict=True)]
        for places, *arrays in zip(micro_batches, ids, labels, strict=True)
    ]
    rows = [
        [[place_row(row, length) for row in rows] for rows in places] for places in micro_batches
    ]
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        document_lengths=[[lengths for lengths, _ in places] for places in laid_out],
        rows=rows,
        row_lengths=[[sum(row.tokens for row in place) for place in places] for places in rows],
        trained_tokens=sum(trained for places in laid_out for _, trained in places),
        position=position,
        overlong=overlong,
    )


def place_row(row: Row, length: int) -> PlacedRow:
    """What is noted of a row in a place of `length` tokens."""
    return PlacedRow(row.source, row.row_key, min(len(row.input_ids), length))


def lay_out(
    rows: Sequence[Row], ids: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[list[int], int]:
    """Write the rows of one place into its ids and labels, every token of them once.

    Returns:
        Its document lengths, and how many labels are trained.
    """
    start = trained = 0
    lengths: list[int] = []
    for row in rows:
        if len(row.input_ids) > len(ids):
            row = cut(row, len(ids))
        stop = start + len(row.input_ids)
        ids[start:stop] = row.input_ids
        labels[start : stop - 1] = row.input_ids[1:]
        if row.loss_mask is not None:
            np.putmask(labels[start : stop - 1], ~row.loss_mask[1:], IGNORED_LABEL)
        # the next token belongs to another document
        labels[start - 1 + np.cumsum(row.document_lengths)] = IGNORED_LABEL
        if row.loss_mask is None:
            trained += stop - start - len(row.document_lengths)
        else:
            trained += int(np.count_nonzero(labels[start:stop] != IGNORED_LABEL))
        lengths += row.document_lengths.tolist()
        start = stop
    ids[start:] = 0
    labels[start:] = IGNORED_LABEL
    return lengths + [len(ids) - start] * (start < len(ids)), trained


def cut(row: Row, tokens: int) -> Row:
    """The first tokens of a row."""
    ends = np.minimum(np.cumsum(row.document_lengths), tokens)
    lengths = np.diff(ends, prepend=0)
    return row._replace(
        input_ids=row.input_ids[:tokens],
        loss_mask=None if row.loss_mask is None else row.loss_mask[:tokens],
        document_lengths=lengths[lengths > 0],
    )


def position_ids(document_lengths: Sequence[Sequence[int]]) -> Tensor:
    """[b, s] int64 positions that restart at every document."""
    return torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in document_lengths]
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def document_mask(document_lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """[b, 1, s, s] bool, true where a token may attend: earlier or same, in its own document.

    None when every row is one document, for which plain causal attention is the same and faster.
    """
    if all(len(lengths) == 1 for lengths in document_lengths):
        return None
    documents = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in document_lengths]
    ).to(device)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)
