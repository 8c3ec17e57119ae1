"""A linear layer over a frozen quantized weight, with the gradient of its input.

The weight is dequantized once in the forward pass and once in the backward pass, and is gone when
either is done: what is kept for the backward pass are the quantized parts alone, which the layer
holds anyway. Operators that torch cannot look into keep a compiler from holding the dequantized
weight of the forward pass for the backward pass, as it would where it sees one expression twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.dequantize import dequantize


def frozen_linear(
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    threshold: float | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, in the type of x.

    Args:
        x: [..., inputs]; bias: [outputs], frozen as well.
        parts, kind, shape, settings: see `dequantize.dequantize`.
        threshold: with kind "int8", also quantize x row by row and multiply in integers, except for
            columns with a magnitude above it (0: none), as LLM.int8() does. None: as all others.

    Source: https://arxiv.org/abs/2208.07339 for the threshold.
    """
    limit = -1.0 if threshold is None else threshold
    output: Tensor = _frozen_linear(x, bias, list(parts), kind, list(shape), list(settings), limit)
    return output


@torch.library.custom_op("headrace::frozen_linear", mutates_args=())
def _frozen_linear(
    x: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    threshold: float,
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if kind == "int8" and threshold >= 0:
        return _in_integers(x, bias, parts[0], parts[1], threshold)
    return functional.linear(x, dequantize(parts, kind, shape, settings, x.dtype), bias)


@torch.library.custom_op("headrace::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(
    gradient: Tensor, parts: list[Tensor], kind: str, shape: list[int], settings: list[int]
) -> Tensor:
    return gradient @ dequantize(parts, kind, shape, settings, gradient.dtype)


@_frozen_linear.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    threshold: float,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_frozen_linear_backward.register_fake
def _(
    gradient: Tensor, parts: list[Tensor], kind: str, shape: list[int], settings: list[int]
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, parts, ctx.kind, ctx.shape, ctx.settings, _ = inputs
    ctx.save_for_backward(*parts)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    x_gradient = _frozen_linear_backward(gradient, parts, ctx.kind, ctx.shape, ctx.settings)
    settings: list[None] | None = None if ctx.settings else []  # of the structure of what came in
    return x_gradient, None, [None] * len(parts), None, None, settings, None


_frozen_linear.register_autograd(_input_gradient, setup_context=_keep)


def _in_integers(
    x: Tensor, bias: Tensor | None, codes: Tensor, magnitudes: Tensor, threshold: float
) -> Tensor:
    """LLM.int8(), by bitsandbytes' operators."""
    flat = x.reshape(-1, x.shape[-1])
    operators = torch.ops.bitsandbytes
    quantized, rows, outliers = operators.int8_vectorwise_quant.default(
        flat.to(torch.float16, copy=True), threshold
    )
    if outliers is None:
        product = operators.int8_scaled_mm.default(
            quantized, codes, rows, magnitudes, bias=bias, dtype=x.dtype
        )
    else:
        product, _ = operators.int8_mixed_scaled_mm.default(
            flat, quantized, codes, rows, magnitudes, outliers, bias
        )
    output: Tensor = product.view(*x.shape[:-1], codes.shape[0])
    return output
