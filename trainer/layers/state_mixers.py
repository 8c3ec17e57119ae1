"""Modules with a state, such as delta nets and convolutions, that restart at each document.

Without a kernel that knows documents, each runs by itself through transformers' own module, which
is exact. Read against transformers 5.23.
"""

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from headrace.trainer.layers.documents import Documents

MASK = "attention_mask"  # argument of every mixer, by which documents come
POSITIONS = "position_ids"


class RestartsAtDocuments(nn.Module):
    """Base, before a mixer's own class, that takes documents for a mask."""

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

        states = documents.apply(mix, hidden_states)
        return (states, *others) if others else states


@cache
def restarting(kind: Any) -> Any:
    """Return the subclass of a mixer's class that restarts at documents."""
    return type(kind.__name__, (RestartsAtDocuments, kind), {})


def restart_at_documents(mixer: nn.Module) -> None:
    """Let a mixer restart at documents, in place: it gets a subclass of its class."""
    kind: Any = type(mixer)
    if not isinstance(mixer, RestartsAtDocuments):
        mixer.__class__ = restarting(kind)
        mixer.training = False
