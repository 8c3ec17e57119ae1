"""Columns of a micro-batch, beside ids and labels, that some objectives and methods need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device
from headrace.trainer.sequence_slice import SequenceSlice
from headrace.trainer.vision.inputs import VisionInputs

Pairs = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Extras:
    """Optional columns of one micro-batch of b sequences of s tokens.

    Attributes:
        pairs: [b/2] tokens of both sides of the pairs in each sequence; on the last stage only.
        control_classes: [b, s] int8: -1, 0, 1.
        vision: pictures among the tokens.
    """

    pairs: Pairs | None = None
    control_classes: Tensor | None = None
    vision: VisionInputs | None = None

    def of_stage(self, *, first: bool, last: bool) -> "Extras":
        """Return what a stage is sent of it."""
        vision = None if self.vision is None else self.vision.of_stage(first=first)
        return replace(self, pairs=self.pairs if last else None, vision=vision)

    def to(self, device: torch.device, sequence: SequenceSlice) -> "Extras":
        """Return it with a slice of its tensors on a device."""
        classes, vision = self.control_classes, self.vision
        if classes is not None:
            classes = to_device(sequence.share(classes), device)
        if vision is not None:
            vision = vision.through(partial(to_device, device=device))
        return replace(self, control_classes=classes, vision=vision)


NO_EXTRAS = Extras()


def pairs_of(extras: Sequence[Extras]) -> list[Pairs] | None:
    """Return the pairs of a step's micro-batches; None if their rows are none."""
    return [part.pairs for part in extras if part.pairs is not None] or None
