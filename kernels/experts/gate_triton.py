"""The gate of experts and its gradient, each pair read and written once, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def gated_pass(
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """See `gate.gated`; a limit of 0 is none."""
    pairs, inner = states.shape[0], states.shape[1] // 2
    output = torch.empty(pairs, inner, dtype=states.dtype, device=states.device)
    _gate[(pairs,)](
        states.contiguous(),
        weights.contiguous(),
        experts,
        states if bias is None else bias.contiguous(),
        output,
        inner,
        alpha,
        limit,
        BIASED=bias is not None,
        INTERLEAVED=interleaved,
        LIMITED=limit > 0,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return output


def gated_gradient_pass(
    gradient: Tensor,
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of states and weights."""
    pairs, inner = gradient.shape
    states = states.contiguous()
    states_gradient = torch.empty_like(states)
    weights_gradient = torch.empty_like(weights)
    _gate_gradient[(pairs,)](
        gradient,
        states,
        weights.contiguous(),
        experts,
        states if bias is None else bias.contiguous(),
        states_gradient,
        weights_gradient,
        inner,
        alpha,
        limit,
        BIASED=bias is not None,
        INTERLEAVED=interleaved,
        LIMITED=limit > 0,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return states_gradient, weights_gradient


@triton.jit
def _load(
    states,
    bias,
    experts,
    pair,
    first,
    inner,
    BIASED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate and up of one pair, from one column on."""
    start = pair * 2 * inner
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * BLOCK)
        there = both < 2 * inner
        values = tl.load(states + start + both, mask=there, other=0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(experts + pair).to(tl.int64) * 2 * inner
            values += tl.load(bias + expert + both, mask=there, other=0.0).to(tl.float32)
        gate, up = values.reshape(BLOCK, 2).split()
    else:
        column = first + tl.arange(0, BLOCK)
        there = column < inner
        gate = tl.load(states + start + column, mask=there, other=0.0).to(tl.float32)
        up = tl.load(states + start + inner + column, mask=there, other=0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(experts + pair).to(tl.int64) * 2 * inner
            gate += tl.load(bias + expert + column, mask=there, other=0.0).to(tl.float32)
            up += tl.load(bias + expert + inner + column, mask=there, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _gate(
    states,
    weights,
    experts,
    bias,
    output,
    inner,
    alpha,
    limit,
    BIASED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    for first in range(0, inner, BLOCK):
        gate, up = _load(states, bias, experts, pair, first, inner, BIASED, INTERLEAVED, BLOCK)
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        value = gate * tl.sigmoid(alpha * gate) * up * weight
        column = first + tl.arange(0, BLOCK)
        tl.store(
            output + pair * inner + column, value.to(output.dtype.element_ty), mask=column < inner
        )


@triton.jit
def _gate_gradient(
    gradient,
    states,
    weights,
    experts,
    bias,
    states_gradient,
    weights_gradient,
    inner,
    alpha,
    limit,
    BIASED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    added = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, inner, BLOCK):
        gate, up = _load(states, bias, experts, pair, first, inner, BIASED, INTERLEAVED, BLOCK)
        column = first + tl.arange(0, BLOCK)
        there = column < inner
        given = tl.load(gradient + pair * inner + column, mask=there, other=0.0).to(tl.float32)
        gate_counts = gate == gate
        up_counts = gate_counts
        if LIMITED:
            gate_counts = gate <= limit
            up_counts = (up >= -limit) & (up <= limit)
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        share = tl.sigmoid(alpha * gate)
        opened = gate * share
        slope = share * (1 + alpha * gate * (1 - share))
        added += given * opened * up
        gate_gradient = tl.where(gate_counts, given * weight * up * slope, 0.0)
        up_gradient = tl.where(up_counts, given * weight * opened, 0.0)
        start = states_gradient + pair * 2 * inner
        kind = states_gradient.dtype.element_ty
        if INTERLEAVED:
            both = tl.join(gate_gradient, up_gradient).reshape(2 * BLOCK)
            place = 2 * first + tl.arange(0, 2 * BLOCK)
            tl.store(start + place, both.to(kind), mask=place < 2 * inner)
        else:
            tl.store(start + column, gate_gradient.to(kind), mask=there)
            tl.store(start + inner + column, up_gradient.to(kind), mask=there)
    total = tl.sum(added, axis=0)
    tl.store(weights_gradient + pair, total.to(weights_gradient.dtype.element_ty))
