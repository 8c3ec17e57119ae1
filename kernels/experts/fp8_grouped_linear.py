"""Grouped products over frozen matrices in 8-bit floats, in both directions.

The scheme is that of `fp8.linear`: rows of the input are quantized, the gradient is multiplied by
the scales of its group's outputs before it is quantized, and one copy of the codes serves both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.dequantize import e4m3
from headrace.kernels.experts.grouped_product import grouped_product_reference
from headrace.kernels.fp8.rows import quantize_rows
from headrace.kernels.on_accelerator import on_accelerator

BY_MATRIX = ("fp8", "int8", "plain")  # kinds whose parts have a dimension for the matrices


def fp8_grouped_linear(
    x: Tensor,
    groups: Tensor,
    offsets: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    scales: Tensor,
) -> Tensor:
    """Return [rows, outputs]: each row times the transpose of its group's matrix, in the type of x.

    Args:
        x: [rows, inputs], sorted by group.
        groups: [rows], the group of each row; offsets: [groups] int32, where each one's rows end.
        parts, kind, shape, settings: of the stack, [groups, outputs, inputs]; see
            `dequantize.dequantize`.
        scales: [groups, outputs] float32, what e4m3 codes of the matrices' rows are multiplied
            with.
    """
    output: Tensor = _fp8_grouped_product(
        x, groups, offsets, list(parts), kind, list(shape), list(settings), scales
    )
    return output


def quantize_sorted(x: Tensor, groups: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows in e4m3 and the scale of each, as `fp8.rows.quantize_rows` does.

    Args:
        groups: [rows]; factors: [groups, columns] float32, what rows are multiplied with first.
    """
    if on_accelerator(x):
        from headrace.kernels.experts.quantize_rows_triton import quantize_rows_pass

        return quantize_rows_pass(x, factors, groups)
    return quantize_rows(x if factors is None else x.float() * factors[groups])


def stack_e4m3(
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    scales: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """Return [groups, n, k]: a stack over its rows' scales in e4m3, k lying side by side.

    Args:
        transposed: n are the inputs, not the outputs.
    """
    groups, outputs, inputs = shape
    flat = [part.flatten(0, 1) for part in parts] if kind in BY_MATRIX or ":" in kind else parts
    rows = (groups * outputs, inputs)
    codes = e4m3(flat, kind, rows, settings, scales.flatten(), transposed=transposed)
    if transposed:  # [inputs, groups * outputs]
        return codes.view(inputs, groups, outputs).transpose(0, 1)
    return codes.view(groups, outputs, inputs)


def scaled_grouped_product(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return each row of `a * a_scales` times the transpose of its group's `b * b_scales`.

    Args:
        a: [rows, k] and b: [groups, n, k], e4m3; a_scales: [rows, 1]; b_scales: [groups, n].
    """
    if not on_accelerator(a):
        wide = a.float() * a_scales
        matrices = b.float() * b_scales.unsqueeze(-1)
        return grouped_product_reference(wide, matrices.transpose(1, 2), offsets).to(dtype)
    product = torch._scaled_grouped_mm(
        a,
        b.transpose(1, 2),
        a_scales.squeeze(1),
        b_scales,
        offs=offsets,
        out_dtype=torch.bfloat16,  # the only type that it gives
        use_fast_accum=True,
    )
    return product.to(dtype)


@torch.library.custom_op("headrace::fp8_grouped_product", mutates_args=())
def _fp8_grouped_product(
    x: Tensor,
    groups: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    quantized, row_scales = quantize_sorted(x, groups, None)
    matrices = stack_e4m3(parts, kind, shape, settings, scales, transposed=False)
    return scaled_grouped_product(quantized, matrices, row_scales, scales, offsets, x.dtype)


@torch.library.custom_op("headrace::fp8_grouped_input_gradient", mutates_args=())
def _fp8_grouped_input_gradient(
    gradient: Tensor,
    groups: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    quantized, row_scales = quantize_sorted(gradient, groups, scales)
    matrices = stack_e4m3(parts, kind, shape, settings, scales, transposed=True)
    ones = torch.ones(shape[0], shape[2], device=scales.device)
    return scaled_grouped_product(quantized, matrices, row_scales, ones, offsets, gradient.dtype)


@_fp8_grouped_product.register_fake
def _(
    x: Tensor,
    groups: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[1])


@_fp8_grouped_input_gradient.register_fake
def _(
    gradient: Tensor,
    groups: Tensor,
    offsets: Tensor,
    parts: list[Tensor],
    kind: str,
    shape: list[int],
    settings: list[int],
    scales: Tensor,
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], shape[2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, groups, offsets, parts, ctx.kind, ctx.shape, ctx.settings, scales = inputs
    ctx.save_for_backward(groups, offsets, scales, *parts)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    groups, offsets, scales, *parts = ctx.saved_tensors
    x_gradient = _fp8_grouped_input_gradient(
        gradient, groups, offsets, parts, ctx.kind, ctx.shape, ctx.settings, scales
    )
    settings: list[None] | None = None if ctx.settings else []  # of the structure of what came in
    return x_gradient, None, None, [None] * len(parts), None, None, settings, None


_fp8_grouped_product.register_autograd(_input_gradient, setup_context=_keep)
