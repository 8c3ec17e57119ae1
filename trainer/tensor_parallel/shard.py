"""A rank's place among those that share the weights of a stage, and what they exchange."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAST = -1  # dimension of features


@dataclass(frozen=True)
class TensorShard:
    """A rank's place among those that share weights; by default it holds them whole.

    Every rank goes through the same tokens. Between cut layers states are alike at all ranks, and
    so are their gradients. Source: Megatron-LM, https://arxiv.org/abs/1909.08053.

    Attributes:
        group: of these ranks, over the device's backend.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None

    @property
    def is_whole(self) -> bool:
        """Return whether weights are not cut."""
        return self.ranks == 1

    def all_reduce(self, tensor: Tensor, *, largest: bool = False) -> Tensor:
        """Return the sum over the ranks, or the largest values, without gradient."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self.group)
        return total

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which are of one shape, in order."""
        mine = tensor.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, group=self.group)
        return parts

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's part of a dimension, a view."""
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)

    def spread(self, states: Tensor) -> Tensor:
        """Return states that all ranks have alike, for use with a part of the weights.

        Their gradient is the sum of what the ranks find.
        """
        spread: Tensor = Spread.apply(states, self)
        return spread

    def total(self, states: Tensor) -> Tensor:
        """Return the sum of the ranks' states; its gradient goes to each of them."""
        total: Tensor = Total.apply(states, self)
        return total

    def joined(self, states: Tensor) -> Tensor:
        """Return the ranks' features side by side; each is given the gradient of its own."""
        joined: Tensor = Joined.apply(states, self)
        return joined

    def own(self, states: Tensor) -> Tensor:
        """Return this rank's part of features that all have; gradients are put side by side."""
        own: Tensor = Own.apply(states, self)
        return own


WHOLE_WEIGHTS = TensorShard()


class Spread(torch.autograd.Function):
    """Nothing forward, a sum backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.all_reduce(gradients[0]), None


class Total(torch.autograd.Function):
    """A sum forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shard: TensorShard) -> Tensor:
        return shard.all_reduce(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Joined(torch.autograd.Function):
    """Features of all ranks side by side forward, a part backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return torch.cat(shard.all_gather(states), dim=LAST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.part(gradients[0], LAST), None


class Own(torch.autograd.Function):
    """A part of the features forward, those of all ranks side by side backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return shard.part(states, LAST).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.shard.all_gather(gradients[0]), dim=LAST), None
