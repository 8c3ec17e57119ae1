"""Slices of rows that go through a stage one after the other, and what it keeps of earlier ones.

Attention of a slice sees the keys and values of all slices up to it, so a stage keeps them, once
for each row. Backward passes come in the opposite order: each hands the gradients of earlier keys
and values on to the passes of their slices. Source: https://arxiv.org/abs/2406.03488.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class KeptKeys:
    """Keys and values of a micro-batch's rows in one layer, and gradients for earlier slices."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []  # keys and values, [b, s, heads, size]
        self.gradients: list[Tensor] = []  # of those before the slice that went back last

    def join(self, states: Sequence[Tensor], start: int, tokens: int) -> list[Tensor]:
        """Keep keys and values of a slice; return those of all tokens up to its end.

        Args:
            states: [b, heads, slice, size] each.
            start: first token of the slice.
            tokens: of whole rows.
        """
        joined: tuple[Tensor, ...] = WithEarlier.apply(self, start, tokens, *states)
        return list(joined)

    def write(self, states: Sequence[Tensor], start: int, tokens: int) -> tuple[Tensor, ...]:
        """Write a slice, again if its layer is recomputed; return all up to its end."""
        if not self.states:
            self.states = [x.new_empty(x.shape[0], tokens, x.shape[1], x.shape[3]) for x in states]
        end = start + states[0].shape[2]
        for kept, given in zip(self.states, states, strict=True):
            kept[:, start:end].copy_(given.transpose(1, 2))
        # `.data` counts no versions: later slices are written behind what is saved of this one
        return tuple(kept[:, :end].transpose(1, 2).data for kept in self.states)

    def take(self, gradients: Sequence[Tensor], start: int) -> list[Tensor]:
        """Add the gradients of all tokens up to a slice's end; return those of the slice."""
        if self.gradients:
            gradients = [a + b for a, b in zip(gradients, self.gradients, strict=True)]
        self.gradients = [gradient[:, :, :start] for gradient in gradients] if start else []
        return [gradient[:, :, start:] for gradient in gradients]


class WithEarlier(torch.autograd.Function):
    """Keys and values of a slice, joined to those before it."""

    @staticmethod
    def forward(
        ctx: Any, kept: KeptKeys, start: int, tokens: int, *states: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.kept, ctx.start = kept, start
        return kept.write(states, start, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.kept.take(gradients, ctx.start)


@dataclass
class KeptRows:
    """Keys, values and routers that a stage keeps of one micro-batch's slices.

    Attributes:
        layers: keys and values in each of its layers.
        routers: of each slice, for each layer with a router, see `balance_parts`.
    """

    layers: list[KeptKeys]
    routers: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class RowSlice:
    """The tokens of rows that are in one pass; by default all.

    Attributes:
        kept: what the passes of the same rows share.
    """

    number: int = 0
    count: int = 1
    kept: KeptRows | None = None

    @property
    def is_whole(self) -> bool:
        """Return whether rows are not cut."""
        return self.count == 1

    def bounds(self, tokens: int) -> tuple[int, int]:
        """Return where the slice begins and ends in rows of so many tokens."""
        return self.number * tokens // self.count, (self.number + 1) * tokens // self.count

    def share(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return the slice of a dimension that is the tokens of whole rows."""
        if self.is_whole:
            return tensor
        start, end = self.bounds(tensor.shape[dim])
        return tensor.narrow(dim, start, end - start)


WHOLE_ROWS = RowSlice()
