"""Frozen weights turned to e4m3 for one product, in Triton, transposed where that is wanted."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3 = torch.float8_e4m3fn
ROWS, COLUMNS = 64, 128  # of a tile


def scaled_e4m3(weight: Tensor, scales: Tensor, *, transposed: bool) -> Tensor:
    """Return `weight / scales` in e4m3, read once.

    Args:
        weight: [outputs, inputs], any floating type; scales: [outputs] float32.
        transposed: return [inputs, outputs].
    """
    rows, columns = weight.shape
    output = _empty(rows, columns, weight.device, transposed)
    _scale[_grid(rows, columns)](
        weight.contiguous(),
        scales,
        output,
        rows,
        columns,
        TRANSPOSED=transposed,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=8,
    )
    return output


def four_bit_e4m3(
    codes: Tensor,
    block_scales: Tensor,
    table: Tensor,
    block: int,
    shape: Sequence[int],
    scales: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """Return a weight of 4-bit codes over `scales`, in e4m3; the codes are read once.

    Args:
        codes: packed, two a byte, the first in the upper half; in the order of the rows.
        block_scales: float32, one for each `block` weights; `block` divides the inputs.
        table: [16] float32, what each code stands for.
        shape: outputs, inputs; scales: [outputs] float32.
        transposed: return [inputs, outputs].
    """
    rows, columns = shape
    output = _empty(rows, columns, codes.device, transposed)
    _unpack[_grid(rows, columns)](
        codes.view(-1),
        block_scales,
        table,
        scales,
        output,
        rows,
        columns,
        SHARED=block,
        TRANSPOSED=transposed,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=8,
    )
    return output


def _empty(rows: int, columns: int, device: torch.device, transposed: bool) -> Tensor:
    shape = (columns, rows) if transposed else (rows, columns)
    return torch.empty(shape, dtype=E4M3, device=device)


def _grid(rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)


@triton.jit
def _scale(
    weight,
    scales,
    output,
    rows,
    columns,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    _store(output, value / scale[:, None], row, column, rows, columns, TRANSPOSED)


@triton.jit
def _unpack(
    codes,
    block_scales,
    table,
    scales,
    output,
    rows,
    columns,
    SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % tiles * COLUMNS
    pair = first // 2 + tl.arange(0, COLUMNS // 2)
    start = row.to(tl.int64)[:, None] * columns
    inside = (row < rows)[:, None] & (pair < columns // 2)[None, :]
    byte = tl.load(codes + start // 2 + pair[None, :], mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    shared = tl.load(block_scales + (start + 2 * pair[None, :]) // SHARED, mask=inside, other=0.0)
    factor = shared / scale[:, None]
    value = tl.join(
        tl.load(table + (byte >> 4)) * factor, tl.load(table + (byte & 15)) * factor
    ).reshape(ROWS, COLUMNS)
    column = first + tl.arange(0, COLUMNS)
    _store(output, value, row, column, rows, columns, TRANSPOSED)


@triton.jit
def _store(output, value, row, column, rows, columns, TRANSPOSED: tl.constexpr):
    codes = value.to(tl.float8e4nv)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if TRANSPOSED:
        at = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(output + at, tl.trans(codes), mask=tl.trans(inside))
    else:
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(output + at, codes, mask=inside)
