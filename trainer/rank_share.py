"""A rank's place among those that have something in common, each a part of it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAST = -1  # dimension


@dataclass(frozen=True)
class RankShare:
    """A rank's place among those that share something; by default it holds it whole.

    Attributes:
        group: of these ranks, over the device's backend.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is cut."""
        return self.ranks == 1

    def share(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's share of a dimension, a view."""
        if self.is_whole:
            return tensor
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which are of one shape, in order, without gradient."""
        mine = tensor.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, group=self.group)
        return parts

    def all_reduce(self, tensor: Tensor, *, largest: bool = False) -> Tensor:
        """Return the sum over the ranks, or the largest values, without gradient."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self.group)
        return total

    def join(self, share: Tensor) -> Tensor:
        """Join the ranks' shares of the last dimension, at each of them.

        The gradient of a share is that part of the whole's gradient: every rank is to compute the
        same of the whole.
        """
        if self.is_whole:
            return share
        joined: Tensor = Join.apply(share, self)
        return joined


class Join(torch.autograd.Function):
    """The shares of all ranks side by side forward, a share backward."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, ranks: RankShare) -> Tensor:
        ctx.ranks = ranks
        return torch.cat(ranks.all_gather(share), dim=LAST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.share(gradients[0], LAST), None
