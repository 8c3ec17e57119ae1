"""Head projection and cross-entropy, in chunks of tokens: the logits are never held as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.token_statistics import TokenStatistics

IGNORED_LABEL = -100
CHUNK_LOGITS = 1 << 26  # alive at once in float32, 256 MiB; twice as many in bfloat16
ROW_MULTIPLE = 128  # of a chunk, where it has so many: matrix units work on tiles of rows


Projection = Callable[[Tensor, Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    project: Projection = functional.linear,
    triton: bool = False,
    statistics: TokenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against labels.

    The gradients are computed in the forward pass, while a chunk's logits exist, so the loss must
    be used once and in a single backward. A weight that needs no gradient costs none.

    Args:
        hidden: [tokens, hidden size], float32 or bfloat16.
        weight: [vocabulary, hidden size], the same type.
        labels: [tokens] int64; `IGNORED_LABEL` tokens have loss 0 and no gradient.
        scale: factor of the returned scalar, for example 1 / trained tokens.
        logit_scale, softcap: see `shaped_logits`.
        project: what computes a chunk's logits from its hidden states and the weight, for a frozen
            weight that is multiplied in 8-bit floats; gradients are by the weight as it is.
        triton: one kernel for loss and gradient, over logits in the type of `hidden`; else torch
            over float32 logits.
        statistics: of all tokens, to be filled in.

    Returns:
        The sum of the losses times `scale`, a float32 scalar, and the losses of all tokens,
        [tokens] float32 in nats, detached.
    """
    shape = (logit_scale, softcap)
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, scale, shape, project, triton, statistics
    )


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, all logits at once: the twin that tests compare with."""
    logits = shaped_logits(functional.linear(hidden, weight), logit_scale, softcap)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum() * scale, losses.detach()


def shaped_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """`logit_scale` * logits, bent to within +-softcap: softcap * tanh(logits / softcap)."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        shape: tuple[float, float | None],
        project: Projection,
        triton: bool,
        statistics: TokenStatistics | None,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        chunk_gradient = _in_triton if triton else _in_torch
        logit_bytes = hidden.element_size() if triton else 4
        for chunk in chunks(hidden.shape[0], weight.shape[0] * logit_bytes):
            logits_grad = chunk_gradient(
                project(hidden[chunk], weight),
                labels[chunk],
                losses[chunk],
                scale,
                shape,
                wants_hidden or wants_weight,
                None if statistics is None else statistics[chunk],
            )
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[chunk])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, hidden[chunk])
            del logits_grad  # before the next chunk's logits: one chunk at a time
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        upstream = gradients[0]
        return (
            None if hidden_grad is None else hidden_grad * upstream.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * upstream.to(weight_grad.dtype),
            *[None] * 6,
        )


def chunks(tokens: int, token_bytes: int) -> list[slice]:
    """Slices of tokens whose logits, `token_bytes` for each, take as much as `CHUNK_LOGITS` do."""
    rows = max(1, 4 * CHUNK_LOGITS // token_bytes)
    if rows > ROW_MULTIPLE:
        rows -= rows % ROW_MULTIPLE
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _in_triton(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    scale: float,
    shape: tuple[float, float | None],
    gradient: bool,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """Fill in `losses`; the gradient of the logits, in their memory."""
    from headrace.kernels.cross_entropy_triton import cross_entropy_rows  # Triton is for GPUs only

    cross_entropy_rows(
        logits,
        labels,
        losses,
        ignored=IGNORED_LABEL,
        scale=scale,
        gradient=gradient,
        logit_scale=shape[0],
        softcap=shape[1],
        statistics=None if statistics is None else (statistics.entropy, statistics.rank),
    )
    return logits


def _in_torch(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    scale: float,
    shape: tuple[float, float | None],
    gradient: bool,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """Fill in `losses`; the gradient of the logits, (softmax - one-hot) * scale where trained."""
    dtype = logits.dtype
    logit_scale, softcap = shape
    shaped = shaped_logits(logits.float(), logit_scale, softcap)
    losses.copy_(
        functional.cross_entropy(shaped, labels, ignore_index=IGNORED_LABEL, reduction="none")
    )
    if statistics is not None:
        statistics.fill(shaped, labels, losses)
    if not gradient:
        return logits
    bend = None if softcap is None else 1 - (shaped / softcap).square()
    trained = labels != IGNORED_LABEL
    result = torch.softmax(shaped, dim=-1, out=shaped)
    one = trained.to(result.dtype).unsqueeze(1)
    result.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -one)
    result.mul_(one * (scale * logit_scale))
    if bend is not None:
        result.mul_(bend)
    return result.to(dtype)
