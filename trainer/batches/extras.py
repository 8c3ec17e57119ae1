"""Columns of a micro-batch, beside ids and labels, that some objectives and methods need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device
from headrace.trainer.sequence_slice import SequenceSlice

Pairs = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Extras:
    """Optional columns of one micro-batch of b sequences of s tokens.

    Attributes:
        pairs: [b/2] tokens of both sides of the pairs in each sequence; on the last stage only.
            Of single answers: of each, and of the same prompt with another answer, if any.
        desirable: the label of each single answer, in order; on the last stage only.
        mismatched: the second half of the sequences holds prompts with answers to other ones,
            which count for nothing but the baseline.
        control_classes: [b, s] int8: -1, 0, 1.
    """

    pairs: Pairs | None = None
    control_classes: Tensor | None = None
    desirable: list[bool] | None = None
    mismatched: bool = False

    @property
    def in_halves(self) -> bool:
        """Return whether the second half of the sequences stands beside the first."""
        return self.pairs is not None and (self.desirable is None or self.mismatched)

    def counted(self, row_lengths: list[int]) -> list[int]:
        """Return the lengths of those rows whose tokens count, 0 for mismatched answers."""
        own = len(row_lengths) // 2 if self.mismatched else len(row_lengths)
        return row_lengths[:own] + [0] * (len(row_lengths) - own)

    def of_stage(self, *, last: bool) -> "Extras":
        """Return what a stage is sent of it."""
        return self if last else replace(self, pairs=None, desirable=None)

    def to(self, device: torch.device, sequence: SequenceSlice) -> "Extras":
        """Return it with a slice of its tensors on a device."""
        if self.control_classes is None:
            return self
        classes = sequence.share(self.control_classes)
        return replace(self, control_classes=to_device(classes, device))


NO_EXTRAS = Extras()


def pairs_of(extras: Sequence[Extras]) -> list[Pairs] | None:
    """Return the pairs of a step's micro-batches; None if their rows are none."""
    return [part.pairs for part in extras if part.pairs is not None] or None
