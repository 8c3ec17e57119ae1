"""Quantized weights back to numbers.

4-bit and 8-bit weights of bitsandbytes go through its own operators, which its import registers and
which are fast. For HQQ, whose PyTorch code takes several passes, there is a kernel of ours.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from headrace.kernels.fp8.rows import E4M3
from headrace.kernels.on_accelerator import on_accelerator

FOUR_BIT = ("nf4", "fp4")
MOST_AT_ONCE = 1 << 30  # weights; bitsandbytes counts them in 32 bits
HQQ_WORDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits -> values in a word of the packed tensor


def dequantize(
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """A weight from its quantized form, rounded to `dtype` once.

    Args:
        parts, settings: by kind.
            "nf4", "fp4": packed codes and the largest magnitude of each block of settings[0]
            values; or, with magnitudes quantized themselves, packed codes, codes of the
            magnitudes, their table, the scales of blocks of settings[1] magnitudes, the mean.
            "int8": [outputs, inputs] int8 and the largest magnitude of each row, whose code is
            settings[0], 127.
            "hqq": packed codes, scales and zeros; settings are bits and axis.
            "fp8": [outputs, inputs] e4m3 and the scale of each row.
            "plain": the weight itself.
            "module:function": what that function of (parts, shape, settings, dtype) takes.
        shape: of the weight; of stacks [matrices, outputs, inputs], and so are the parts, but for
            those of "nf4" and "fp4", which lie one after the other.
    """
    if ":" in kind:
        weight: Tensor = function_of(kind)(parts, shape, settings, dtype)
        return weight
    if kind == "hqq":
        return dequantize_hqq(parts[0], parts[1], parts[2], settings[0], settings[1], shape, dtype)
    if kind == "plain":
        return parts[0].to(dtype)
    if kind == "fp8":
        codes, scales = parts
        return (codes.float() * scales.unsqueeze(-1)).to(dtype)
    if kind == "int8":
        codes, magnitudes = parts
        return (codes * (magnitudes / settings[0]).unsqueeze(-1)).to(dtype)
    return _dequantize_four_bit(
        parts[0], block_scales(parts, settings), kind, settings[0], shape, dtype
    )


@cache
def function_of(kind: str) -> Callable[..., Tensor]:
    """Return the function by which a format of its own is dequantized."""
    module, _, name = kind.partition(":")
    found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    return found


def _dequantize_four_bit(
    codes: Tensor,
    scales: Tensor,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return a 4-bit weight by bitsandbytes' operator, a part at a time where it is very large."""
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    count = torch.Size(shape).numel()
    if count <= MOST_AT_ONCE:
        weight: Tensor = operator(codes, scales, block, kind, shape, dtype)
        return weight
    weight = torch.empty(count, dtype=dtype, device=codes.device)
    flat = codes.view(-1, 1)
    for start in range(0, count, MOST_AT_ONCE):
        stop = min(start + MOST_AT_ONCE, count)
        part, part_scales = flat[start // 2 : stop // 2], scales[start // block : -(-stop // block)]
        weight[start:stop] = operator(part, part_scales, block, kind, (stop - start,), dtype)
    return weight.view(tuple(shape))


def e4m3(
    parts: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    settings: Sequence[int],
    scales: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """Return a weight over its rows' scales, in e4m3.

    Args:
        parts, kind, shape, settings: see `dequantize`.
        scales: [outputs] float32.
        transposed: return [inputs, outputs].
    """
    if kind == "fp8":
        return transposed_bytes(parts[0]) if transposed else parts[0]
    if not on_accelerator(scales):
        weight = dequantize(parts, kind, shape, settings, torch.float32)
        codes = (weight / scales.unsqueeze(1)).to(E4M3)
        return codes.t().contiguous() if transposed else codes
    from headrace.kernels.dequantize_e4m3_triton import four_bit_e4m3, scaled_e4m3

    if kind in FOUR_BIT and shape[1] % settings[0] == 0:
        table = _four_bit_table(kind, scales.device)
        blocks = block_scales(parts, settings)
        return four_bit_e4m3(
            parts[0], blocks, table, settings[0], shape, scales, transposed=transposed
        )
    if kind == "plain":
        return scaled_e4m3(parts[0], scales, transposed=transposed)
    weight = dequantize(parts, kind, shape, settings, torch.bfloat16)
    return scaled_e4m3(weight, scales, transposed=transposed)


def transposed_bytes(codes: Tensor) -> Tensor:
    """Return `codes.T`, of one byte each, laid out row by row."""
    if on_accelerator(codes):
        from headrace.kernels.transpose_triton import transpose_bytes

        return transpose_bytes(codes.view(torch.uint8)).view(codes.dtype)
    return codes.t().contiguous()


def block_scales(parts: Sequence[Tensor], settings: Sequence[int]) -> Tensor:
    """Return the largest magnitude of each block of a 4-bit weight, float32."""
    if len(parts) == 2:
        return parts[1]
    _, codes, table, scales, mean = parts
    operator = torch.ops.bitsandbytes.dequantize_blockwise.default
    found: Tensor = operator(codes, scales, table, settings[1], torch.float32) + mean
    return found


@cache
def _four_bit_table(kind: str, device: torch.device) -> Tensor:
    """Return [16] float32: what each 4-bit code stands for, by bitsandbytes itself."""
    codes = torch.arange(16, dtype=torch.uint8, device=device) * 16
    one = torch.ones(1, device=device)
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    values: Tensor = operator(codes.view(-1, 1), one, 64, kind, (32,), torch.float32)
    return values.flatten()[::2].contiguous()


def dequantize_hqq(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    axis: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero) * scale, computed in float32; on GPUs in one pass.

    Args:
        packed: [rows of words, columns]; words hold rows that lie a number of words apart.
        scale, zero: [1, columns] with axis 0, [rows, 1] with axis 1, of any type.
            Of stacks, all three have a dimension for the matrices before these.
        axis: along which groups lie in the packed matrix.

    Source: https://github.com/dropbox/hqq, for the layout.
    """
    if on_accelerator(packed):
        from headrace.kernels.dequantize_hqq_triton import dequantize_hqq_pass

        steps = HQQ_WORDS[bits]
        return dequantize_hqq_pass(packed, scale, zero, bits, steps, axis, shape, dtype)
    return dequantize_hqq_reference(packed, scale, zero, bits, axis, shape, dtype)


def dequantize_hqq_reference(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    axis: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The same in plain torch."""
    *stack, _, columns = packed.shape
    rows = torch.Size(shape).numel() // columns // math.prod(stack)
    steps = HQQ_WORDS[bits]
    shifts = [(steps - 1 - step) * bits for step in range(steps)]
    words = [(packed >> shift) & (2**bits - 1) for shift in shifts]
    codes = torch.cat(words, dim=-2)[..., :rows, :]
    return ((codes.float() - zero.float()) * scale.float()).view(tuple(shape)).to(dtype)
