"""The gate between the two products of an expert, with the weight of its token and its bias."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.on_accelerator import on_accelerator


@dataclass(frozen=True)
class Gate:
    """The columns of a product that are the gate, and its activation.

    Attributes:
        interleaved: gate and up take turns; else they lie one after the other.
        alpha: of `gate * sigmoid(alpha * gate)`; 1 is SiLU.
        limit: largest gate, and largest magnitude of up, to which 1 is added then, as gpt_oss
            does; None: neither.
    """

    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None


def gated(
    states: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None, gate: Gate
) -> Tensor:
    """Return [pairs, inner]: the gate times up times the weight of the pair, in the type of states.

    Args:
        states: [pairs, 2 * inner], gate and up; weights: [pairs], of any type.
        experts: [pairs], of which expert each is; bias: [experts, 2 * inner], frozen.
    """
    limit = 0.0 if gate.limit is None else gate.limit
    output: Tensor = _gated(states, weights, experts, bias, gate.interleaved, gate.alpha, limit)
    return output


def gated_reference(
    states: Tensor, weights: Tensor, experts: Tensor, bias: Tensor | None, gate: Gate
) -> Tensor:
    """Return the same as `gated` in plain torch, computed in float32."""
    first, second = _halves(states, experts, bias, gate)
    if gate.limit is not None:
        first = first.clamp(max=gate.limit)
        second = second.clamp(-gate.limit, gate.limit) + 1
    opened = first * torch.sigmoid(gate.alpha * first)
    return (opened * second * weights.float().unsqueeze(1)).to(states.dtype)


def gated_gradient_reference(
    gradient: Tensor,
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate: Gate,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of states and weights in plain torch."""
    first, second = _halves(states, experts, bias, gate)
    first_counts = second_counts = torch.ones((), device=states.device)
    if gate.limit is not None:
        first_counts, second_counts = first <= gate.limit, second.abs() <= gate.limit
        first = first.clamp(max=gate.limit)
        second = second.clamp(-gate.limit, gate.limit) + 1
    share = torch.sigmoid(gate.alpha * first)
    slope = share * (1 + gate.alpha * first * (1 - share))
    given = gradient.float()
    weighted = given * weights.float().unsqueeze(1)
    parts = weighted * second * slope * first_counts, weighted * first * share * second_counts
    joined = torch.stack(parts, dim=-1).flatten(1) if gate.interleaved else torch.cat(parts, -1)
    total = (given * first * share * second).sum(dim=1)
    return joined.to(states.dtype), total.to(weights.dtype)


def _halves(
    states: Tensor, experts: Tensor, bias: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor]:
    """Return gate and up in float32, biases added."""
    wide = states.float() if bias is None else states.float() + bias.float()[experts]
    if gate.interleaved:
        return wide[:, ::2], wide[:, 1::2]
    first, second = wide.chunk(2, dim=-1)
    return first, second


@torch.library.custom_op("headrace::gated", mutates_args=())
def _gated(
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    if on_accelerator(states):
        from headrace.kernels.experts.gate_triton import gated_pass

        return gated_pass(states, weights, experts, bias, interleaved, alpha, limit)
    gate = Gate(interleaved, alpha, limit or None)
    return gated_reference(states, weights, experts, bias, gate)


@torch.library.custom_op("headrace::gated_gradient", mutates_args=())
def _gated_gradient(
    gradient: Tensor,
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    if on_accelerator(states):
        from headrace.kernels.experts.gate_triton import gated_gradient_pass

        return gated_gradient_pass(
            gradient.contiguous(), states, weights, experts, bias, interleaved, alpha, limit
        )
    gate = Gate(interleaved, alpha, limit or None)
    return gated_gradient_reference(gradient, states, weights, experts, bias, gate)


@_gated.register_fake
def _(
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    return states.new_empty(states.shape[0], states.shape[1] // 2)


@_gated_gradient.register_fake
def _(
    gradient: Tensor,
    states: Tensor,
    weights: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, weights, experts, bias, ctx.interleaved, ctx.alpha, ctx.limit = inputs
    ctx.save_for_backward(states, weights, experts, bias)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = _gated_gradient(gradient, *ctx.saved_tensors, ctx.interleaved, ctx.alpha, ctx.limit)
    return *found, None, None, None, None, None


_gated.register_autograd(_gradients, setup_context=_keep)
