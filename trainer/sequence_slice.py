"""The slice of every row that a rank holds, where the ranks of a stage share rows among them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.trainer.rank_share import RankShare


class SequenceSlice(RankShare):
    """A rank's place among those that share rows; by default it holds rows whole."""

    def share(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's share of a dimension: of the tokens of whole rows, or of heads."""
        return super().share(tensor, dim)

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, which has no gradient."""
        return tensor if self.is_whole else self.all_reduce(tensor)

    def exchange(self, blocks: Tensor) -> Tensor:
        """Send block k to rank k; return the blocks that the ranks have sent here, in their order.

        Args:
            blocks: [ranks, ...], alike at all ranks.
        """
        received: Tensor = Exchange.apply(blocks, self)
        return received


WHOLE = SequenceSlice()


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
