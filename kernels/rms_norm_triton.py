"""RMSNorm over rows, forward and backward, in Triton; compiled code sees the kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 4096  # numbers in flight per program; short rows are taken several at a time
WARP_NUMBERS = 1024  # of these per warp
TILES = 1  # that a program does, one after the other
TRAINED_TILES = 32  # the same where it sums the weight's gradient over them


def rms_norm_rows(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """See `rms_norm.rms_norm`."""
    y: Tensor = _forward(x.contiguous(), weight.contiguous(), eps, offset, rounds_first)[0]
    return y


@triton_op("headrace::rms_norm", mutates_args={})
def _forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the factor of each row, float32."""
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    y = torch.empty_like(x, dtype=dtype)
    columns = x.shape[-1]
    rows = x.numel() // columns
    factors = torch.empty(rows, dtype=torch.float32, device=x.device)
    shape = _shape(columns)
    wrap_triton(_normalize)[(triton.cdiv(rows, shape["ROWS"] * TILES),)](
        x, weight, y, factors, rows, columns, eps, offset, rounds_first, TILES=TILES, **shape
    )
    return y, factors


@triton_op("headrace::rms_norm_backward", mutates_args={})
def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    factors: Tensor,
    offset: float,
    rounds_first: bool,
    trained: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and parts of the weight's, [parts, columns] float32; 0 if not trained."""
    x_gradient = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    shape = _shape(columns)
    tiles = TRAINED_TILES if trained else TILES
    programs = triton.cdiv(rows, shape["ROWS"] * tiles)
    parts = torch.empty(programs if trained else 0, columns, dtype=torch.float32, device=x.device)
    wrap_triton(_differentiate)[(programs,)](
        gradient,
        x,
        weight,
        factors,
        x_gradient,
        parts,
        rows,
        columns,
        offset,
        rounds_first,
        TRAINED=trained,
        TILES=tiles,
        **shape,
    )
    return x_gradient, parts


def _shape(columns: int) -> dict[str, int]:
    """Rows and columns of a tile, and its warps."""
    width = triton.next_power_of_2(columns)
    rows = max(1, TILE // width)
    warps = min(16, max(1, rows * width // WARP_NUMBERS))
    return {"ROWS": rows, "COLUMNS": width, "num_warps": warps}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.rounds_first = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, factors = ctx.saved_tensors
    trained = ctx.needs_input_grad[1]
    settings = (ctx.offset, ctx.rounds_first, trained)
    x_gradient, parts = _backward(gradient.contiguous(), x, weight, factors, *settings)
    weight_gradient = parts.sum(0).to(weight.dtype) if trained else None
    return x_gradient, weight_gradient, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _normalize(
    x,
    weight,
    y,
    factors,
    rows,
    columns,
    eps,
    offset,
    rounds_first: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, column < columns, other=0.0).to(tl.float32) + offset
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(x + at, inside, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
        normed = value * factor[:, None]
        if rounds_first:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        tl.store(y + at, (normed * w[None, :]).to(y.dtype.element_ty), inside)
        tl.store(factors + row, factor, row < rows)


@triton.jit
def _differentiate(
    gradient,
    x,
    weight,
    factors,
    x_gradient,
    parts,
    rows,
    columns,
    offset,
    rounds_first: tl.constexpr,
    TRAINED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, column < columns, other=0.0).to(tl.float32) + offset
    part = tl.zeros([COLUMNS], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
        factor = tl.load(factors + row, row < rows, other=0.0)
        normed = tl.load(x + at, inside, other=0.0).to(tl.float32) * factor[:, None]
        weighted = g * w[None, :]
        along = tl.sum(weighted * normed, 1) / columns  # what only scales the row changes nothing
        change = factor[:, None] * (weighted - along[:, None] * normed)
        tl.store(x_gradient + at, change.to(x_gradient.dtype.element_ty), inside)
        if TRAINED:
            if rounds_first:
                normed = normed.to(x.dtype.element_ty).to(tl.float32)
            part += tl.sum(g * normed, 0)
    if TRAINED:
        parts += tl.program_id(0).to(tl.int64) * columns
        tl.store(parts + column, part, column < columns)
