"""Linear layers of sorted rows, one matrix for each group, as mixtures of experts have them.

Matrices that are frozen may
be held quantized; they are dequantized once in the forward pass and once in the backward pass, all
of a stack together, and what is kept for the backward pass is what the module holds anyway.
Operators that torch cannot look into keep a compiler from holding the dequantized stack.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.dequantize import dequantize
from headrace.kernels.experts.grouped_product import grouped_outer, grouped_product


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Return [rows, outputs]: each row times the transpose of its group's matrix.

    Args:
        x: [rows, inputs], sorted by group.
        weight: [groups, outputs, inputs] in the type of x, trained; transposed views are taken.
        offsets: [groups] int32, where the rows of each group end; the last one is rows.
    """
    output: Tensor = _grouped_linear(x, weight, offsets)
    return output


def frozen_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
) -> Tensor:
    """Return the same for matrices that are frozen, in the type of x.

    Args:
        parts, kind, shape, settings: of all matrices together, [groups, outputs, inputs]; see
            `dequantize.dequantize`.
    """
    output: Tensor = _frozen_grouped_linear(
        x, offsets, list(parts), kind, list(shape), list(settings)
    )
    return output


@torch.library.custom_op("headrace::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grouped_product(x, weight.transpose(1, 2), offsets)


@torch.library.custom_op("headrace::grouped_input_gradient", mutates_args=())
def _grouped_input_gradient(gradient: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grouped_product(gradient.contiguous(), weight, offsets)


@torch.library.custom_op("headrace::grouped_weight_gradient", mutates_args=())
def _grouped_weight_gradient(gradient: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return grouped_outer(gradient.contiguous(), x, offsets)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight.shape[2])


@_grouped_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return gradient.new_empty(offsets.shape[0], gradient.shape[1], x.shape[1])


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_input_gradient(gradient, weight, offsets) if wants_x else None,
        _grouped_weight_gradient(gradient, x, offsets) if wants_weight else None,
        None,
    )


_grouped_linear.register_autograd(_gradients, setup_context=_keep_all)


@torch.library.custom_op("headrace::frozen_grouped_linear", mutates_args=())
def _frozen_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
) -> Tensor:
    weight = dequantize(parts, kind, shape, settings, x.dtype)
    return grouped_product(x, weight.transpose(1, 2), offsets)


@torch.library.custom_op("headrace::frozen_grouped_input_gradient", mutates_args=())
def _frozen_grouped_input_gradient(
    gradient: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
) -> Tensor:
    weight = dequantize(parts, kind, shape, settings, gradient.dtype)
    return grouped_product(gradient.contiguous(), weight, offsets)


@_frozen_grouped_linear.register_fake
def _(
    x: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
) -> Tensor:
    return x.new_empty(x.shape[0], shape[1])


@_frozen_grouped_input_gradient.register_fake
def _(
    gradient: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], shape[2])


def _keep_parts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, parts, ctx.kind, ctx.shape, ctx.settings = inputs
    ctx.save_for_backward(offsets, *parts)


def _frozen_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    offsets, *parts = ctx.saved_tensors
    x_gradient = _frozen_grouped_input_gradient(
        gradient, offsets, parts, ctx.kind, ctx.shape, ctx.settings
    )
    settings: list[None] | None = None if ctx.settings else []  # of the structure of what came in
    return x_gradient, None, [None] * len(parts), None, None, settings


_frozen_grouped_linear.register_autograd(_frozen_gradient, setup_context=_keep_parts)
