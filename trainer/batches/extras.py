"""Columns of a micro-batch, beside ids and labels, that some objectives and methods need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice
from headrace.trainer.sequence_slice import SequenceSlice
from headrace.trainer.vision.inputs import VisionInputs

Pairs = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Extras:
    """Optional columns of one micro-batch of b sequences of s tokens.

    Attributes:
        pairs: [b/2] tokens of both sides of the pairs in each sequence; on the last stage only.
            Of single answers: of each, and of the same prompt with another answer, if any.
        desirable: the label of each single answer, in order; on the last stage only.
        ends: [2n] sequence and place of the last token of each chosen answer, then of each rejected
            one; on the last stage only, where a head gives one number of each.
        mismatched: the second half of the sequences holds prompts with answers to other ones,
            which count for nothing but the baseline.
        control_classes: [b, s] int8: -1, 0, 1.
        vision: pictures among the tokens.
    """

    pairs: Pairs | None = None
    control_classes: Tensor | None = None
    ends: list[tuple[int, int]] | None = None
    desirable: list[bool] | None = None
    mismatched: bool = False
    vision: VisionInputs | None = None

    @property
    def in_halves(self) -> bool:
        """Return whether the second half of the sequences stands beside the first."""
        return self.pairs is not None and (self.desirable is None or self.mismatched)

    def counted(self, row_lengths: list[int]) -> list[int]:
        """Return the lengths of those rows whose tokens count, 0 for mismatched answers."""
        own = len(row_lengths) // 2 if self.mismatched else len(row_lengths)
        return row_lengths[:own] + [0] * (len(row_lengths) - own)

    def of_stage(self, *, first: bool, last: bool) -> "Extras":
        """Return what a stage is sent of it."""
        vision = None if self.vision is None else self.vision.of_stage(first=first)
        kept = self if last else replace(self, pairs=None, desirable=None, ends=None)
        return replace(kept, vision=vision)

    def to(
        self, device: torch.device, sequence: SequenceSlice, rows: RowSlice = WHOLE_ROWS
    ) -> "Extras":
        """Return it with a slice of its tensors on a device."""
        classes, vision = self.control_classes, self.vision
        if classes is not None:
            classes = to_device(sequence.share(rows.share(classes)), device)
        if vision is not None:
            vision = vision.through(partial(to_device, device=device))
        return replace(self, control_classes=classes, vision=vision)


NO_EXTRAS = Extras()


def pairs_of(extras: Sequence[Extras]) -> list[Pairs] | None:
    """Return the pairs of a step's micro-batches; None if their rows are none."""
    return [part.pairs for part in extras if part.pairs is not None] or None
