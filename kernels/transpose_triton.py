"""Transposes a matrix of bytes, in tiles that go through registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128


def transpose_bytes(matrix: Tensor) -> Tensor:
    """Return [columns, rows] of a [rows, columns] matrix of bytes, row by row in memory.

    Torch's copy of a transposed view reads or writes single bytes.
    """
    rows, columns = matrix.shape
    output = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE),)
    _transpose[grid](matrix, output, rows, columns, TILE=TILE, num_warps=8)
    return output


@triton.jit
def _transpose(source, target, rows, columns, TILE: tl.constexpr):
    tiles = tl.cdiv(columns, TILE)
    row = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    values = tl.load(source + offsets, mask=inside)
    turned = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target + turned, tl.trans(values), mask=tl.trans(inside))
