"""A linear layer over a frozen weight that is multiplied in 8-bit floats in both directions.

The weight is, or becomes for the product, e4m3 with one scale for each output channel. The forward
pass quantizes the input row by row. The backward pass multiplies the gradient by the weight's
scales first and quantizes the product row by row, so that the same codes serve both directions;
they are transposed on the fly. Nothing is kept for the backward pass but the weight as it is held,
and quantizing is written in plain torch, so that a compiler fuses it with what stands before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.dequantize import e4m3
from headrace.kernels.fp8.rows import e4m3_scales, quantize_rows
from headrace.kernels.on_accelerator import on_accelerator

ALIGNMENT = 16  # inputs and outputs must be multiples of it, for the matrix units


def fp8_linear(
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    scales: Tensor,
) -> Tensor:
    """Return `x @ weight.T + bias` in the type of x, the product of 8-bit floats.

    Args:
        x: [..., inputs]; bias: [outputs], frozen as well.
        parts, kind, shape, settings: see `dequantize.dequantize`.
        scales: [outputs] float32, what e4m3 codes of the weight's rows are multiplied with.
    """
    flat = x.reshape(-1, x.shape[-1])
    quantized, row_scales = quantize_rows(flat.detach())
    product: Tensor = _fp8_product(
        flat, quantized, row_scales, list(parts), kind, list(shape), list(settings), scales
    )
    output = product.view(*x.shape[:-1], shape[0])
    return output if bias is None else output + bias.to(x.dtype)


def fp8_trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` in the type of x, for a weight that is trained.

    The product and the gradient of x are of 8-bit floats, the weight turned to them row by row each
    time; the weight's own gradient is a product in the type of x.

    Args:
        x: [..., inputs]; weight: [outputs, inputs]; bias: [outputs].
    """
    flat = x.reshape(-1, x.shape[-1])
    quantized, row_scales = quantize_rows(flat.detach())
    scales = e4m3_scales(weight.detach()).squeeze(1)
    product: Tensor = _fp8_trained_product(flat, quantized, row_scales, weight, scales)
    output = product.view(*x.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(x.dtype)


def scaled_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return `(a * a_scales) @ (b * b_scales).T`, summed in float32 and rounded once.

    Args:
        a: [m, k] and b: [n, k], e4m3; a_scales: [m, 1] and b_scales: [n], float32.
    """
    if not on_accelerator(a):
        return scaled_product_reference(a, b, a_scales, b_scales, dtype)
    product = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scales,
        scale_b=b_scales.unsqueeze(0),
        out_dtype=torch.bfloat16,  # the only type that row-wise scales go with
        use_fast_accum=True,
    )
    return product.to(dtype)


def scaled_product_reference(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the same as `scaled_product` in plain torch."""
    product = (a.float() @ b.float().t()) * a_scales * b_scales
    return product.to(dtype)


# The product takes x itself too, unused: its gradient is that of the quantized rows, straight
# through. Torch cannot look into these operators, so that a compiler keeps no other weight.
@torch.library.custom_op("headrace::fp8_product", mutates_args=())
def _fp8_product(
    x: Tensor,
    quantized: Tensor,
    row_scales: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    weight = e4m3(parts, kind, shape, settings, scales, transposed=False)
    return scaled_product(quantized, weight, row_scales, scales, x.dtype)


@torch.library.custom_op("headrace::fp8_input_gradient", mutates_args=())
def _fp8_input_gradient(
    quantized: Tensor,
    row_scales: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    weight = e4m3(parts, kind, shape, settings, scales, transposed=True)
    ones = torch.ones(shape[1], device=scales.device)
    return scaled_product(quantized, weight, row_scales, ones, dtype)


@_fp8_product.register_fake
def _(
    x: Tensor,
    quantized: Tensor,
    row_scales: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


@_fp8_input_gradient.register_fake
def _(
    quantized: Tensor,
    row_scales: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return row_scales.new_empty(quantized.shape[0], shape[1], dtype=dtype)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, parts, ctx.kind, ctx.shape, ctx.settings, scales = inputs
    ctx.save_for_backward(*parts, scales)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *parts, scales = ctx.saved_tensors
    x_gradient = _scaled_input_gradient(gradient, parts, ctx.kind, ctx.shape, ctx.settings, scales)
    settings: list[None] | None = None if ctx.settings else []  # of the structure of what came in
    return x_gradient, None, None, [None] * len(parts), None, None, settings, None


_fp8_product.register_autograd(_input_gradient, setup_context=_keep_weight)


def _scaled_input_gradient(
    gradient: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    """Return `gradient @ weight`, the weight's scales taken into the gradient first."""
    quantized, row_scales = quantize_rows(gradient.float() * scales)
    found: Tensor = _fp8_input_gradient(
        quantized, row_scales, parts, kind, shape, settings, scales, gradient.dtype
    )
    return found


@torch.library.custom_op("headrace::fp8_trained_product", mutates_args=())
def _fp8_trained_product(
    x: Tensor, quantized: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor
) -> Tensor:
    codes = e4m3([weight], "plain", weight.shape, [], scales, transposed=False)
    return scaled_product(quantized, codes, row_scales, scales, x.dtype)


@_fp8_trained_product.register_fake
def _(x: Tensor, quantized: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_input_and_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, weight, scales = inputs
    ctx.save_for_backward(x, weight, scales)


def _trained_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scales = ctx.saved_tensors
    shape = list(weight.shape)
    x_gradient = _scaled_input_gradient(gradient, [weight], "plain", shape, [], scales)
    weight_gradient = (gradient.t() @ x).to(weight.dtype)
    return x_gradient, None, None, weight_gradient, None


_fp8_trained_product.register_autograd(_trained_gradients, setup_context=_keep_input_and_weight)
