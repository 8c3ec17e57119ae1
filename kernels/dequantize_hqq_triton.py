"""HQQ's packed weights back to numbers, one pass, in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def dequantize_hqq_pass(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    steps: int,
    axis: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """See `dequantize.dequantize_hqq`; every word, of `steps` values, is read once."""
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    weight = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    words, columns = packed.shape[-2:]
    matrices = packed.numel() // (words * columns)
    _unpack[(triton.cdiv(packed.numel(), BLOCK),)](
        packed,
        scale,
        zero,
        weight,
        packed.numel(),
        words,
        columns,
        weight.numel() // columns // matrices,
        scale.numel() // matrices,
        BITS=bits,
        STEPS=steps,
        BY_COLUMN=axis == 0,
        BLOCK=BLOCK,
    )
    return weight


@triton.jit
def _unpack(
    packed,
    scale,
    zero,
    weight,
    count,
    words,
    columns,
    rows,
    groups,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    matrix = at // (words * columns)
    row, column = at // columns % words, at % columns
    word = tl.load(packed + at, inside, other=0).to(tl.int32)
    for step in tl.static_range(STEPS):
        code = (word >> ((STEPS - 1 - step) * BITS)) & ((1 << BITS) - 1)
        this_row = row + step * words
        kept = inside & (this_row < rows)
        group = column if BY_COLUMN else this_row
        group += matrix * groups
        s = tl.load(scale + group, kept, other=0.0).to(tl.float32)
        z = tl.load(zero + group, kept, other=0.0).to(tl.float32)
        value = (code.to(tl.float32) - z) * s
        place = (matrix * rows + this_row) * columns + column
        tl.store(weight + place, value.to(weight.dtype.element_ty), kept)
