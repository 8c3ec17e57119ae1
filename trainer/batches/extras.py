"""Columns of a micro-batch, beside ids and labels, that some objectives and methods need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice
from headrace.trainer.sequence_slice import SequenceSlice

Pairs = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Extras:
    """Optional columns of one micro-batch of b sequences of s tokens.

    Attributes:
        pairs: [b/2] tokens of both sides of the pairs in each sequence; on the last stage only.
        control_classes: [b, s] int8: -1, 0, 1.
    """

    pairs: Pairs | None = None
    control_classes: Tensor | None = None

    def of_stage(self, *, last: bool) -> "Extras":
        """Return what a stage is sent of it."""
        return self if last else replace(self, pairs=None)

    def to(
        self, device: torch.device, sequence: SequenceSlice, rows: RowSlice = WHOLE_ROWS
    ) -> "Extras":
        """Return it with a slice of its tensors on a device."""
        if self.control_classes is None:
            return self
        classes = sequence.share(rows.share(self.control_classes))
        return replace(self, control_classes=to_device(classes, device))


NO_EXTRAS = Extras()


def pairs_of(extras: Sequence[Extras]) -> list[Pairs] | None:
    """Return the pairs of a step's micro-batches; None if their rows are none."""
    return [part.pairs for part in extras if part.pairs is not None] or None
