"""Modules with a state, such as delta nets and convolutions, that restart at each document.

Each document runs by itself through transformers' own module, which is exact. Short convolutions,
and where flash-linear-attention is installed delta nets and Mamba 2, take all documents as one row.
Read against transformers 5.23.
"""

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from headrace.trainer.architecture.families_state import OneRow
from headrace.trainer.families.state_kernels import (
    RESTART,
    Restarts,
    carries_by,
    has_kernels,
    rebound,
)
from headrace.trainer.layers.documents import GAP, Documents

MASK = "attention_mask"  # argument of every mixer, by which documents come
POSITIONS = "position_ids"


class RestartsAtDocuments(nn.Module):
    """Base, before a mixer's own class, that takes documents for a mask.

    Attributes:
        one_row: how all documents are taken as one row; None where they run by themselves.
    """

    one_row: OneRow | None = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but of the mixer itself: in training it would take a path that
        multiplies by the output's weight without calling the layer, around adapters and formats.
        """
        super().train(mode)
        self.training = False
        return self

    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        """Mix each document alone, or what there is as transformers does under its own mask."""
        documents = named.get(MASK)
        if not isinstance(documents, Documents):
            return super().forward(hidden_states, **named)
        others: list[None] = []

        def mix(hidden: Tensor) -> Tensor:
            arguments = named | {MASK: None}
            if arguments.get(POSITIONS) is not None:
                positions = torch.arange(hidden.shape[1], device=hidden.device)
                arguments[POSITIONS] = positions.expand(hidden.shape[0], -1)
            output = super(RestartsAtDocuments, self).forward(hidden, **arguments)
            if isinstance(output, tuple):  # states, and what nobody asks for
                others[:] = [None] * (len(output) - 1)
                output = output[0]
            mixed: Tensor = output
            return mixed

        if self.one_row is not None and self.one_row.scan is not None:
            named = named | {RESTART: Restarts(None if documents.whole else documents.bounds)}
        if self.one_row is None or documents.whole:
            states = documents.apply(mix, hidden_states)
        else:
            states = documents.apply_in_one_row(mix, hidden_states)
        return (states, *others) if others else states


@cache
def restarting(kind: Any) -> Any:
    """Return the subclass of a mixer's class that restarts at documents."""
    return type(kind.__name__, (RestartsAtDocuments, rebound(kind)), {})


def restart_at_documents(mixer: nn.Module) -> None:
    """Let a mixer restart at documents, in place: it gets a subclass of its class."""
    kind: Any = type(mixer)
    if not isinstance(mixer, RestartsAtDocuments):
        mixer.__class__ = restarting(kind)
        mixer.training = False


def take_one_row(mixer: nn.Module, one_row: OneRow | None, device: torch.device) -> None:
    """Let a mixer take all documents as one row where that is the same: its convolution sees no
    further than a gap, its projections make zeros of zeros, and a kernel restarts its state.
    """
    assert isinstance(mixer, RestartsAtDocuments)
    if one_row is None or getattr(mixer, one_row.taps) - 1 > GAP:
        return
    biased = any(
        getattr(part, "bias", None) is not None
        for part in mixer.modules()
        if isinstance(part, nn.Linear)
    )
    if not biased and (one_row.scan is None or runs_kernel(mixer, one_row.scan, device)):
        mixer.one_row = one_row


def runs_kernel(mixer: nn.Module, scan: str, device: torch.device) -> bool:
    """Return whether a kernel takes the place of the function that carries a mixer's state."""
    transformers_kind = type(mixer).__mro__[2]  # after the two classes of `restarting`
    return has_kernels(device) and carries_by(transformers_kind, scan)
