"""Rotary embedding of queries and keys, in Triton; compiled code sees the kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

WARPS = 4


def rotary_tokens(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor]:
    """See `rotary.rotary`."""
    turned: tuple[Tensor, Tensor] = _turn(query, key, cosine.contiguous(), sine.contiguous(), False)
    return turned


@triton_op("headrace::rotary", mutates_args={})
def _turn(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """Rotate query and key by the angle of each token, or back by it. Heads may lie anywhere."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    b, s, heads, size = query.shape
    key_heads = key.shape[2]
    wrap_triton(_turn_token)[(b * s,)](
        query,
        key,
        *turned,
        cosine,
        sine,
        s,
        *query.stride()[:3],
        *key.stride()[:3],
        heads,
        key_heads,
        size // 2,
        back,
        HEADS=triton.next_power_of_2(heads),
        KEY_HEADS=triton.next_power_of_2(key_heads),
        HALF=triton.next_power_of_2(size // 2),
        num_warps=WARPS,
    )
    return turned[0], turned[1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cosine, sine, ctx.back = inputs
    ctx.save_for_backward(cosine, sine)


def _turn_back(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *_turn(*gradients, *ctx.saved_tensors, not ctx.back), None, None, None


_turn.register_autograd(_turn_back, setup_context=_keep)


@triton.jit
def _turn_token(
    query,
    key,
    query_turned,
    key_turned,
    cosine,
    sine,
    s,
    query_row,
    query_token,
    query_head,
    key_row,
    key_token,
    key_head,
    heads,
    key_heads,
    half,
    back: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, token = place // s, place % s
    column = tl.arange(0, HALF)
    angle = place * 2 * half + column
    c = tl.load(cosine + angle, column < half, other=0.0).to(tl.float32)[None, :]
    d = tl.load(sine + angle, column < half, other=0.0).to(tl.float32)[None, :]
    if back:
        d = -d
    query += row * query_row + token * query_token
    query_turned += place * heads * 2 * half
    _turn_heads(query, query_turned, c, d, query_head, heads, half, HEADS, HALF)
    key += row * key_row + token * key_token
    key_turned += place * key_heads * 2 * half
    _turn_heads(key, key_turned, c, d, key_head, key_heads, half, KEY_HEADS, HALF)


@triton.jit
def _turn_heads(x, turned, c, d, stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    at = head * stride + column
    first = tl.load(x + at, inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, inside, other=0.0).to(tl.float32)
    at = head * 2 * half + column
    tl.store(turned + at, (first * c - second * d).to(turned.dtype.element_ty), inside)
    tl.store(turned + at + half, (second * c + first * d).to(turned.dtype.element_ty), inside)
