"""Rows turned to 8-bit floats, each read once, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.fp8.rows import LARGEST, SMALLEST_SCALE


def quantize_rows_pass(x: Tensor, factors: Tensor | None, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, e4m3, and the scale of each row, [rows, 1] float32.

    Args:
        x: [rows, columns], any floating type.
        factors: [groups, columns] float32, what rows are multiplied with first, by their group.
        groups: [rows].
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    _quantize[(rows,)](
        x.contiguous(),
        x if factors is None else factors.contiguous(),
        groups,
        codes,
        scales,
        columns,
        FACTORED=factors is not None,
        LARGEST_CODE=LARGEST,
        SMALLEST=SMALLEST_SCALE,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=8,
    )
    return codes, scales


@triton.jit
def _quantize(
    x,
    factors,
    groups,
    codes,
    scales,
    columns,
    FACTORED: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if FACTORED:
        group = tl.load(groups + row).to(tl.int64)
        value *= tl.load(factors + group * columns + column, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / LARGEST_CODE, SMALLEST)
    tl.store(scales + row, scale)
    code = (value / scale).to(tl.float8e4nv)
    tl.store(codes + row * columns + column, code, mask=inside)
