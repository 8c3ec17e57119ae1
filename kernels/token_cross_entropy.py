"""Head projection and the cross-entropy of each token, to be differentiated token by token."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.linear_cross_entropy import (
    IGNORED_LABEL,
    Projection,
    _in_torch,
    _in_triton,
    chunks,
    shaped_logits,
)
from headrace.kernels.token_statistics import TokenStatistics


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    project: Projection = functional.linear,
    triton: bool = False,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """Cross-entropy of each token of `hidden @ weight.T`, for losses that are functions of it.

    A token's gradient is that of its own loss times what arrives for it, so for a frozen weight it
    is computed in the forward pass, while a chunk's logits exist. A trained weight sums over tokens
    and must wait for the factors: then the backward pass computes the logits again.

    Args: as `linear_cross_entropy`.

    Returns:
        [tokens] float32 in nats, differentiable once; 0 without gradient at `IGNORED_LABEL`.
    """
    shape = (logit_scale, softcap)
    losses: Tensor = _TokenCrossEntropy.apply(
        hidden, weight, labels, shape, project, triton, statistics
    )
    return losses


def token_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same in plain torch, all logits at once: the twin that tests compare with."""
    logits = shaped_logits(functional.linear(hidden, weight), logit_scale, softcap)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shape: tuple[float, float | None],
        project: Projection,
        triton: bool,
        statistics: TokenStatistics | None,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        now = wants_hidden and not wants_weight
        unit_grad = torch.empty_like(hidden) if now else None
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        chunk_gradient = _in_triton if triton else _in_torch
        for chunk in _chunks_of(hidden, weight, triton):
            logits = project(hidden[chunk], weight)
            part = None if statistics is None else statistics[chunk]
            gradient = chunk_gradient(logits, labels[chunk], losses[chunk], 1.0, shape, now, part)
            if unit_grad is not None:
                torch.mm(gradient, weight, out=unit_grad[chunk])
            del logits, gradient  # before the next chunk's logits: one chunk at a time
        ctx.shape, ctx.triton = shape, triton
        if now:
            ctx.save_for_backward(unit_grad)
        elif wants_weight:
            ctx.save_for_backward(hidden, weight, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream = gradients[0].unsqueeze(1)
        if len(ctx.saved_tensors) == 1:
            (unit_grad,) = ctx.saved_tensors
            return unit_grad * upstream.to(unit_grad.dtype), *[None] * 6
        hidden, weight, labels = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight)
        chunk_gradient = _in_triton if ctx.triton else _in_torch
        unused = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for chunk in _chunks_of(hidden, weight, ctx.triton):
            logits = functional.linear(hidden[chunk], weight)
            gradient = chunk_gradient(logits, labels[chunk], unused[chunk], 1.0, ctx.shape, True)
            gradient = gradient * upstream[chunk].to(gradient.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[chunk])
            weight_grad.addmm_(gradient.T, hidden[chunk])
            del logits, gradient
        return hidden_grad, weight_grad, *[None] * 5


def _chunks_of(hidden: Tensor, weight: Tensor, triton: bool) -> list[slice]:
    logit_bytes = hidden.element_size() if triton else 4
    return chunks(hidden.shape[0], weight.shape[0] * logit_bytes)
