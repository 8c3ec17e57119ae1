"""Sums of a few rows that lie anywhere, each row read once, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def sum_rows_pass(x: Tensor, places: Tensor) -> Tensor:
    """Return [tokens, columns]: the sum of x[places] of each token, added up in float32.

    Args:
        x: [pairs, columns], row by row; places: [tokens, times].
    """
    tokens, times = places.shape
    columns = x.shape[1]
    total = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    grid = (tokens, triton.cdiv(columns, BLOCK))
    _sum[grid](x, places.contiguous(), total, columns, TIMES=times, BLOCK=BLOCK, num_warps=4)
    return total


@triton.jit
def _sum(x, places, total, columns, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    added = tl.zeros([BLOCK], dtype=tl.float32)
    for time in tl.static_range(TIMES):
        row = tl.load(places + token * TIMES + time).to(tl.int64)
        added += tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + token * columns + column, added.to(total.dtype.element_ty), mask=inside)
