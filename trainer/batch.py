"""What a step is fed with: micro-batches of fixed shape, labels, document boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.shard_reader import Row


@dataclass(frozen=True)
class Batch:
    """One replica's share of a global batch: m micro-batches of b rows of s tokens.

    A row shorter than s is filled up with one more document that no token of the row can see and
    that is not trained. A place without a row (the last batch of a run) holds such filling only.
    """

    input_ids: Tensor  # [m, b, s] int64
    labels: Tensor  # [m, b, s] int64: the next token of the same document, or IGNORED_LABEL
    document_lengths: list[list[list[int]]]  # [m][b] lengths that sum to s
    sources: list[list[str]]  # [m][b]; "" for a place without a row
    row_keys: list[list[int | None]]  # [m][b]; None for a place without a row
    tokens: int  # real tokens, filling left out

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


def make_batch(micro_batches: Sequence[Sequence[Row | None]], sequence_len: int) -> Batch:
    """Lay rows out as tensors.

    Args:
        micro_batches: [m][b] rows; None where the global batch has no row left.
    """
    filled = [[_fill(row, sequence_len) for row in rows] for rows in micro_batches]
    return Batch(
        input_ids=torch.from_numpy(np.stack([[cell[0] for cell in cells] for cells in filled])),
        labels=torch.from_numpy(np.stack([[cell[1] for cell in cells] for cells in filled])),
        document_lengths=[[cell[2] for cell in cells] for cells in filled],
        sources=[["" if row is None else row.source for row in rows] for rows in micro_batches],
        row_keys=[[None if row is None else row.row_key for row in rows] for rows in micro_batches],
        tokens=sum(len(row.input_ids) for rows in micro_batches for row in rows if row is not None),
    )


def _fill(
    row: Row | None, sequence_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Ids, labels and document lengths of one row at full length."""
    ids = np.zeros(sequence_len, dtype=np.int64)
    labels = np.full(sequence_len, IGNORED_LABEL, dtype=np.int64)
    if row is None:
        return ids, labels, [sequence_len]
    length = len(row.input_ids)
    ids[:length] = row.input_ids
    labels[: length - 1] = np.where(row.loss_mask[1:], row.input_ids[1:], IGNORED_LABEL)
    ends = np.cumsum(row.document_lengths)
    labels[ends - 1] = IGNORED_LABEL  # the next token belongs to another document
    lengths = row.document_lengths.tolist()
    return ids, labels, lengths + [sequence_len - length] * (length < sequence_len)


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
