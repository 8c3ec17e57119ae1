"""The slice of every row that a rank holds, where the ranks of a stage share rows among them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SequenceSlice:
    """A rank's place among those that share rows; by default it holds rows whole.

    Attributes:
        group: of these ranks, over the device's backend.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None

    @property
    def is_whole(self) -> bool:
        """Return whether rows are not cut."""
        return self.ranks == 1

    def share(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's share of a dimension: of the tokens of whole rows, or of heads."""
        if self.is_whole:
            return tensor
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)

    def whole(self, tensor: Tensor) -> Tensor:
        """Join the ranks' shares of the last dimension, at each of them.

        The gradient of a share is that part of the whole's gradient: every rank is to compute the
        same of the whole.
        """
        if self.is_whole:
            return tensor
        joined: Tensor = Join.apply(tensor, self)
        return joined

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, which has no gradient."""
        if self.is_whole:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def exchange(self, blocks: Tensor) -> Tensor:
        """Send block k to rank k; return the blocks that the ranks have sent here, in their order.

        Args:
            blocks: [ranks, ...], alike at all ranks.
        """
        received: Tensor = Exchange.apply(blocks, self)
        return received


WHOLE = SequenceSlice()


class Join(torch.autograd.Function):
    """The shares of all ranks side by side."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, part: SequenceSlice) -> Tensor:
        ctx.part = part
        parts = [share.new_empty(share.shape) for _ in range(part.ranks)]
        dist.all_gather(parts, share.contiguous(), group=part.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.part.share(gradients[0], -1), None


class Exchange(torch.autograd.Function):
    """An all-to-all, whose gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, part: SequenceSlice) -> Tensor:
        ctx.part = part
        return all_to_all(blocks, part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_to_all(gradients[0], ctx.part), None


def all_to_all(blocks: Tensor, part: SequenceSlice) -> Tensor:
    """Exchange blocks along the first dimension."""
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=part.group)
    return received
