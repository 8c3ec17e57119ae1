"""A linear layer over a frozen weight in 8-bit floats, multiplied in 8-bit floats both ways.

The weight is held once, in e4m3 with one scale for each output channel. The forward pass quantizes
the input row by row. The backward pass multiplies the gradient by the weight's scales first and
quantizes the product row by row, so that the same codes serve both directions; they are transposed
on the fly. Nothing is kept for the backward pass but the weight, and quantizing is written in plain
torch, so that a compiler fuses it with what stands before it.
"""

from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of e4m3
SMALLEST_SCALE = 1e-12  # rows of zeros stay zeros
ALIGNMENT = 16  # inputs and outputs must be multiples of it, for the matrix units


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3 and the scale of each row.

    Args:
        x: [rows, columns], any floating type.

    Returns:
        codes: [rows, columns] e4m3; scales: [rows, 1] float32; x is about codes * scales.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (wide / scales).to(E4M3), scales


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` in the type of x, the product of 8-bit floats.

    Args:
        x: [..., inputs].
        codes: [outputs, inputs] e4m3; scales: [outputs] float32; weight is codes * scales.
        bias: [outputs], frozen as well.
    """
    flat = x.reshape(-1, x.shape[-1])
    quantized, row_scales = quantize_rows(flat.detach())
    product: Tensor = _fp8_product(flat, quantized, row_scales, codes, scales)
    output = product.view(*x.shape[:-1], codes.shape[0])
    return output if bias is None else output + bias.to(x.dtype)


def scaled_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return `(a * a_scales) @ (b * b_scales).T`, summed in float32 and rounded once.

    Args:
        a: [m, k] and b: [n, k], e4m3; a_scales: [m, 1] and b_scales: [n], float32.
    """
    if not a.is_cuda:
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


def transposed(codes: Tensor) -> Tensor:
    """Return `codes.T` laid out row by row."""
    if codes.is_cuda:
        from headrace.kernels.transpose_triton import transpose_bytes

        return transpose_bytes(codes.view(torch.uint8)).view(codes.dtype)
    return codes.t().contiguous()


# The product takes x itself too, unused: its gradient is that of the quantized rows, straight
# through. Torch cannot look into these operators, so that a compiler keeps no transposed weight.
@torch.library.custom_op("headrace::fp8_product", mutates_args=())
def _fp8_product(
    x: Tensor, quantized: Tensor, row_scales: Tensor, codes: Tensor, scales: Tensor
) -> Tensor:
    return scaled_product(quantized, codes, row_scales, scales, x.dtype)


@torch.library.custom_op("headrace::fp8_input_gradient", mutates_args=())
def _fp8_input_gradient(
    quantized: Tensor, row_scales: Tensor, codes: Tensor, dtype: torch.dtype
) -> Tensor:
    ones = torch.ones(codes.shape[1], device=codes.device)
    return scaled_product(quantized, transposed(codes), row_scales, ones, dtype)


@_fp8_product.register_fake
def _(x: Tensor, quantized: Tensor, row_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@_fp8_input_gradient.register_fake
def _(quantized: Tensor, row_scales: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return row_scales.new_empty(quantized.shape[0], codes.shape[1], dtype=dtype)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, codes, scales = inputs
    ctx.save_for_backward(codes, scales)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    quantized, row_scales = quantize_rows(gradient.float() * scales)
    x_gradient = _fp8_input_gradient(quantized, row_scales, codes, gradient.dtype)
    return x_gradient, None, None, None, None


_fp8_product.register_autograd(_input_gradient, setup_context=_keep_weight)
