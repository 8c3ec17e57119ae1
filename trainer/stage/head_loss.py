"""The head and its loss. Plain heads go through the fused kernel, all others through themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from headrace.kernels.linear_cross_entropy import (
    CHUNK_LOGITS,
    IGNORED_LABEL,
    Projection,
    linear_cross_entropy,
)
from headrace.kernels.token_cross_entropy import token_cross_entropy
from headrace.kernels.token_statistics import TokenStatistics
from headrace.trainer.quantized.modules import QuantizedLinear
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard
from headrace.trainer.tensor_parallel.sharded_cross_entropy import sharded_cross_entropy


@dataclass(frozen=True)
class LogitShape:
    """Logits are the head's output * multiplier, then softcap * tanh(logits / softcap)."""

    multiplier: float = 1.0
    softcap: float | None = None

    def times(self, factor: float) -> "LogitShape":
        """Return the shape of `factor` times these logits."""
        softcap = None if self.softcap is None else self.softcap * factor
        return LogitShape(self.multiplier * factor, softcap)


def is_plain(head: nn.Module) -> bool:
    """Return whether the fused kernel computes this head's loss."""
    if isinstance(head, QuantizedLinear) and head.threshold is not None:
        return False  # multiplied in integers
    known = type(head) in (nn.Linear, QuantizedLinear)
    return known and getattr(head, "bias", None) is None


def projection(head: nn.Module) -> Projection:
    """Return what computes a plain head's logits."""
    held = head.quantized("weight") if isinstance(head, QuantizedLinear) else None
    if held is None or held.product_scales is None:
        return functional.linear
    return lambda hidden, weight: held.linear(hidden, None)


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    scale: float,
    shape: LogitShape,
    seed: int | None = None,
    *,
    triton: bool = False,
    statistics: TokenStatistics | None = None,
    shard: TensorShard = WHOLE_WEIGHTS,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a head's logits.

    Args:
        head: [tokens, hidden size] -> [tokens, vocabulary]; a linear layer, adapted or not.
        hidden: [tokens, hidden size].
        labels: [tokens] int64; `IGNORED_LABEL` tokens have loss 0 and no gradient.
        scale: factor of the returned scalar.
        seed: of the head's own dropout; None if it has none.
        triton: compute a plain head's loss in Triton.
        statistics: of all tokens, to be filled in.
        shard: the part of the vocabulary that the head has here.

    Returns:
        The sum of the losses times `scale`, float32; the losses of all tokens in nats, detached.
    """
    if is_plain(head) and shard.is_whole:
        assert isinstance(head, nn.Linear)
        return linear_cross_entropy(
            hidden,
            head.weight.to(hidden.dtype),
            labels,
            scale,
            logit_scale=shape.multiplier,
            softcap=shape.softcap,
            project=projection(head),
            triton=triton,
            statistics=statistics,
        )
    token_losses = head_token_losses(
        head, hidden, labels, shape, seed, statistics=statistics, shard=shard
    )
    return token_losses.sum() * scale, token_losses.detach()


def head_token_losses(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shape: LogitShape,
    seed: int | None = None,
    *,
    triton: bool = False,
    statistics: TokenStatistics | None = None,
    shard: TensorShard = WHOLE_WEIGHTS,
) -> Tensor:
    """Cross-entropy of each token, [tokens] float32, to be differentiated once.

    Args: as `head_loss`.
    """
    if is_plain(head) and shard.is_whole:
        assert isinstance(head, nn.Linear)
        return token_cross_entropy(
            hidden,
            head.weight.to(hidden.dtype),
            labels,
            logit_scale=shape.multiplier,
            softcap=shape.softcap,
            project=projection(head),
            triton=triton,
            statistics=statistics,
        )
    if not shard.is_whole:
        hidden = shard.spread(hidden)
    rows = max(1, CHUNK_LOGITS // (vocabulary(head) // shard.ranks))
    losses = []
    for number, start in enumerate(range(0, hidden.shape[0], rows)):
        chunk = slice(start, start + rows)
        chunk_seed = None if seed is None else seed + number
        part = None if statistics is None else statistics[chunk]
        arguments = (head, hidden[chunk], labels[chunk], shape, chunk_seed, part, shard)
        losses.append(
            checkpoint(_token_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(losses)


def vocabulary(head: nn.Module) -> int:
    """Number of logits: of a linear layer, or of one that is wrapped by an adapter."""
    size = getattr(head, "out_features", None) or getattr(head, "num_embeddings", None)
    if size is None:
        size = next(p.shape[0] for name, p in head.named_parameters() if name.endswith("weight"))
    return int(size)


def logits_of(head: nn.Module, hidden: Tensor, shape: LogitShape) -> Tensor:
    """[tokens, hidden size] to [tokens, vocabulary] in float32."""
    logits: Tensor = head(hidden).float() * shape.multiplier
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return logits


def _token_losses(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shape: LogitShape,
    seed: int | None,
    statistics: TokenStatistics | None,
    shard: TensorShard,
) -> Tensor:
    """Losses of one chunk; its logits are computed again in the backward pass, not kept."""
    if seed is not None:
        torch.manual_seed(seed)
    logits = logits_of(head, hidden, shape)
    if not shard.is_whole:
        return sharded_cross_entropy(logits, labels, shard, statistics)
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    if statistics is not None:
        statistics.fill(logits, labels, losses)
    return losses
