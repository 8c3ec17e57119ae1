"""A linear layer with a low-rank adapter, all in the type of its input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def lora_linear(x: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """`base + scale * (x @ A.T) @ B.T`, the adapter's part computed in the type of x.

    PEFT casts x to the adapter's float32, multiplies there and casts back.

    Args:
        x: [..., inputs]; base: [..., outputs], what the frozen layer gives for it.
        lora_a: [rank, inputs]; lora_b: [outputs, rank]; of any type.
    """
    return add_adapter(base, functional.linear(x, lora_a.to(x.dtype)), lora_b, scale)


def add_adapter(base: Tensor, low: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return `base + scale * low @ B.T`, for low = x @ A.T.

    Args:
        base: [..., outputs]; low: [..., rank]; lora_b: [outputs, rank].
    """
    return base + functional.linear(low, (lora_b * scale).to(base.dtype))


def low_ranks(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return x @ A.T for the first factors of several adapters, in one product.

    Args:
        x: [..., inputs]; factors: [rank, inputs] each, of any type.
    """
    low = functional.linear(x, torch.cat(list(factors)).to(x.dtype))
    return list(low.split([factor.shape[0] for factor in factors], dim=-1))


def joined_lora_linear(
    x: Tensor, joined: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """The same in one matrix product, [x, x @ A.T] @ [W, scale * B].T.

    Where a layer has far more outputs than inputs, this saves writing the adapter's share of the
    outputs, reading it again and adding it.

    Args:
        joined: [outputs, inputs + rank], the type of x: frozen weight beside scale * B; see `join`.
    """
    output: Tensor = _JoinedLoraLinear.apply(x, joined, lora_a, lora_b, scale)
    return output


def join(weight: Tensor, rank: int) -> Tensor:
    """[outputs, inputs + rank]: a frozen weight, and room for scale * B, which is not filled in."""
    joined = weight.new_zeros(weight.shape[0], weight.shape[1] + rank)
    joined[:, : weight.shape[1]] = weight
    return joined


class _JoinedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, joined: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        low = functional.linear(x, lora_a.to(x.dtype))
        ctx.save_for_backward(x, low, joined, lora_a, lora_b)
        ctx.scale = scale
        return functional.linear(torch.cat([x, low], dim=-1), joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, joined, lora_a, lora_b = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        low_gradient = flat @ (lora_b * ctx.scale).to(x.dtype)
        x_gradient = flat @ joined[:, : x.shape[-1]] + low_gradient @ lora_a.to(x.dtype)
        a_gradient = low_gradient.T @ x.flatten(0, -2)
        b_gradient = flat.T @ low.flatten(0, -2)
        return (
            x_gradient.view(x.shape),
            None,
            a_gradient.to(lora_a.dtype),
            b_gradient.to(lora_b.dtype) * ctx.scale,
            None,
        )
