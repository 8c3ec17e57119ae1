"""Cross-entropy over a vocabulary that is cut among ranks: logits stay where they are."""

from typing import Any

import torch
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.kernels.token_statistics import TokenStatistics
from headrace.trainer.tensor_parallel.shard import TensorShard


def sharded_cross_entropy(
    logits: Tensor, labels: Tensor, shard: TensorShard, statistics: TokenStatistics | None = None
) -> Tensor:
    """Cross-entropy of each token, [tokens] float32, alike at all ranks.

    Args:
        logits: [tokens, vocabulary / ranks] float32, of this rank's part of the vocabulary.
        labels: [tokens] int64; `IGNORED_LABEL` tokens have loss 0 and no gradient.
        statistics: of all tokens, to be filled in.
    """
    losses: Tensor = _ShardedCrossEntropy.apply(logits, labels, shard, statistics)
    return losses


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: TensorShard,
        statistics: TokenStatistics | None,
    ) -> Tensor:
        number = labels - shard.rank * logits.shape[1]
        here = (number >= 0) & (number < logits.shape[1])
        number = number.where(here, 0).unsqueeze(1)
        at_label = logits.gather(1, number)[:, 0].where(here, 0.0)
        largest = shard.all_reduce(logits.amax(dim=1), largest=True)
        shares = (logits - largest.unsqueeze(1)).exp_()
        sums = [shares.sum(dim=1), at_label, torch.linalg.vecdot(shares, logits)]
        total, at_label, weighted = shard.all_reduce(torch.stack(sums))
        log_total = total.log() + largest
        if statistics is not None:
            statistics.entropy.copy_(log_total - weighted / total)
            above = (logits > at_label.unsqueeze(1)).sum(dim=1, dtype=torch.int32)
            statistics.rank.copy_(shard.all_reduce(above))
        trained = labels != IGNORED_LABEL
        ctx.save_for_backward(shares.div_(total.unsqueeze(1)), number, here, trained)
        return (log_total - at_label).where(trained, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shares, number, here, trained = ctx.saved_tensors
        upstream = gradients[0].where(trained, 0.0).unsqueeze(1)
        gradient = shares * upstream
        gradient.scatter_add_(1, number, -upstream.where(here.unsqueeze(1), 0.0))
        return gradient, None, None, None
