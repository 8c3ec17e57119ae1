"""Head projection and cross-entropy, in chunks of tokens: the logits are never held as a whole."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
CHUNK_LOGITS = 1 << 26  # logits alive at once: 256 MiB in float32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against labels.

    The gradients are computed in the forward pass, while a chunk's logits exist, so the loss must
    be used once and in a single backward.

    Args:
        hidden: [tokens, hidden size], float32 or bfloat16.
        weight: [vocabulary, hidden size], the same type.
        labels: [tokens] int64; `IGNORED_LABEL` tokens have loss 0 and no gradient.
        scale: factor of the returned scalar, for example 1 / trained tokens.

    Returns:
        The sum of the losses times `scale`, a float32 scalar, and the losses of all tokens,
        [tokens] float32 in nats, detached.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, scale)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, all logits at once: the twin that tests compare with."""
    logits = functional.linear(hidden, weight).float()
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum() * scale, losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = functional.linear(hidden[chunk], weight).float()
            losses[chunk] = functional.cross_entropy(
                logits, labels[chunk], ignore_index=IGNORED_LABEL, reduction="none"
            )
            if wants_hidden or wants_weight:
                logits_grad = _logits_gradient(logits, labels[chunk], scale).to(hidden.dtype)
                if hidden_grad is not None:
                    torch.mm(logits_grad, weight, out=hidden_grad[chunk])
                if weight_grad is not None:
                    weight_grad.addmm_(logits_grad.T, hidden[chunk])
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        upstream = gradients[0]
        return (
            None if hidden_grad is None else hidden_grad * upstream.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * upstream.to(weight_grad.dtype),
            None,
            None,
        )


def _logits_gradient(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """(softmax - one-hot) * scale, zero where ignored; overwrites the logits."""
    trained = labels != IGNORED_LABEL
    gradient = torch.softmax(logits, dim=-1, out=logits)
    one = trained.to(gradient.dtype).unsqueeze(1)
    gradient.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -one)
    return gradient.mul_(one * scale)
