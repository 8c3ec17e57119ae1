"""A rank's place among those that share the weights of a stage, and what they exchange."""

from typing import Any

import torch
from torch import Tensor

from headrace.trainer.rank_share import LAST, RankShare


class TensorShard(RankShare):
    """A rank's place among those that share weights; by default it holds them whole.

    Every rank goes through the same tokens. Between cut layers states are alike at all ranks, and
    so are their gradients. Source: Megatron-LM, https://arxiv.org/abs/1909.08053.
    """

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


class Own(torch.autograd.Function):
    """A part of the features forward, those of all ranks side by side backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return shard.share(states, LAST).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.shard.all_gather(gradients[0]), dim=LAST), None
