"""The experts of a mixture, all of a layer in one module, whatever their weights are held in.

Tokens are sorted by expert on the device, gathered once, and multiplied group by group; results go
back by lookups. The weight of a token at an expert is applied at the gate, between both products,
where rows are narrower than after the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.kernels.experts.gate import Gate, gated, gated_reference
from headrace.kernels.experts.grouped_linear import frozen_grouped_linear, grouped_linear
from headrace.kernels.experts.routing import Routing, gather_rows, route, sum_rows
from headrace.trainer.quantized.modules import QuantizableModule

WEIGHTS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
PROBES = 64  # values, up to 16 in magnitude, that tell one gate from another


@dataclass(frozen=True)
class ExpertAdapter:
    """LoRA on one matrix of every expert."""

    down: Tensor  # [experts, rank, inputs]
    up: Tensor  # [experts, outputs, rank]
    scale: float


class GroupedExperts(QuantizableModule):
    """Takes the place of transformers' experts with fused weights, over the same parameters.

    Attributes:
        is_transposed: weights are [experts, inputs, outputs], as gpt_oss has them; quantized ones
            are held the other way. PEFT reads this too.
        gate: between the products, or None for one that transformers' class computes itself.
        is_part: other ranks hold further experts; the rows of tokens that are sent to these are
            not multiplied here.
    """

    weights = WEIGHTS

    def __init__(self, experts: Any) -> None:
        super().__init__()
        for name, value in vars(experts).items():
            if not name.startswith("_") and name != "config":
                setattr(self, name, value)
        for name, child in experts.named_children():
            self.add_module(name, child)
        self._parameters |= experts._parameters
        self.num_experts: int = experts.gate_up_proj.shape[0]
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self._apply_gate = type(experts)._apply_gate
        self.gate = self._known_gate()
        self.is_part = False

    def _known_gate(self) -> Gate | None:
        """Return the gate that gives what transformers' code gives, if any does."""
        alpha, limit = getattr(self, "alpha", 1.0), getattr(self, "limit", None)
        with torch.device("cpu"):
            states = torch.linspace(-16, 16, PROBES).roll(PROBES // 3).view(2, -1)
            weights, experts = torch.ones(2), torch.zeros(2, dtype=torch.int64)
        try:
            expected = self._apply_gate(self, states)
        except (AttributeError, NotImplementedError):
            return None
        for gate in (Gate(), Gate(interleaved=True, alpha=alpha, limit=limit)):
            found = gated_reference(states, weights, experts, None, gate)
            if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return gate
        return None

    def as_held(self, value: Tensor) -> Tensor:
        """Return a stack with inputs last, or one of those as a parameter."""
        return value.transpose(1, 2) if self.is_transposed else value

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [tokens, hidden size], the weighted sum of what each token's experts give.

        Args:
            hidden_states: [tokens, hidden size].
            top_k_index, top_k_weights: [tokens, experts of each].
        """
        return self.adapted(hidden_states, top_k_index, top_k_weights, {})

    def adapted(
        self,
        hidden: Tensor,
        chosen: Tensor,
        weights: Tensor,
        adapters: Mapping[str, ExpertAdapter],
    ) -> Tensor:
        """Run as `forward` does, with adapters on the matrices that they are named by."""
        nowhere = chosen >= self.num_experts  # transformers' mark for tokens that go to none
        weights = weights.masked_fill(nowhere, 0.0)
        chosen = chosen.clamp(max=self.num_experts - (not self.is_part))
        routing = route(chosen, self.num_experts)
        states = hidden.to(self._dtype(hidden))
        states = self._own(gather_rows(states, routing.tokens, routing.places), routing)
        states = self._product("gate_up_proj", states, routing, adapters)
        states = self._gated(states, weights, routing)
        states = self._own(self._product("down_proj", states, routing, adapters), routing)
        total = sum_rows(states, routing.tokens, routing.places)
        bias = getattr(self, "down_proj_bias", None)
        if bias is not None:
            numbers = torch.arange(self.num_experts, device=chosen.device)
            share = ((chosen.unsqueeze(-1) == numbers) * weights.unsqueeze(-1)).sum(1)
            total = total + share.to(total.dtype) @ bias.to(total.dtype)
        return total.to(hidden.dtype)

    def _own(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return rows without what lies behind the last expert's, which no product has set."""
        if not self.is_part:
            return rows
        numbers = torch.arange(rows.shape[0], device=rows.device)
        return rows.where((numbers < routing.offsets[-1]).unsqueeze(1), 0.0)

    def _dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the type of the computation: autocast does not know these operators."""
        if any(self.quantized(name) is not None for name in WEIGHTS):
            return self.compute_dtype
        kind = hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype

    def _gated(self, states: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        flat = gather_rows(weights.reshape(-1, 1), routing.order, routing.places.view(-1, 1))
        flat = self._own(flat, routing)
        bias = getattr(self, "gate_up_proj_bias", None)
        frozen = bias is None or not bias.requires_grad
        if self.gate is not None and frozen:
            return gated(states, flat.squeeze(1), routing.experts, bias, self.gate)
        if bias is not None:
            states = states + bias[routing.experts].to(states.dtype)
        return (self._apply_gate(self, states) * flat).to(states.dtype)

    def _product(
        self, name: str, states: Tensor, routing: Routing, adapters: Mapping[str, ExpertAdapter]
    ) -> Tensor:
        output = self._base_product(name, states, routing)
        if name not in adapters:
            return output
        adapter = adapters[name]
        down, up = adapter.down.to(states.dtype), (adapter.up * adapter.scale).to(states.dtype)
        low = grouped_linear(states, down, routing.offsets)
        return output + grouped_linear(low, up.contiguous(), routing.offsets)

    def _base_product(self, name: str, states: Tensor, routing: Routing) -> Tensor:
        held = self.quantized(name)
        if held is not None:
            return held.grouped_linear(states, routing.experts, routing.offsets)
        weight = self.as_held(getattr(self, name))
        if weight.requires_grad:
            return grouped_linear(states, weight.to(states.dtype), routing.offsets)
        return frozen_grouped_linear(states, routing.offsets, [weight], "plain", weight.shape, [])


def install_experts(model: nn.Module) -> nn.Module:
    """Put `GroupedExperts` in the place of all experts of a layout that it computes; in place.

    Args:
        model: without adapters, on the meta device.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if has_known_layout(child):
                setattr(parent, name, GroupedExperts(child))
    return model


def has_known_layout(module: Any) -> bool:
    """Return whether a module is experts as transformers 5.14 to 5.23 declare most of them.

    These have gate and up in one stack, products with nothing but a gate between them, biases for
    both or none, and no buffers.
    """
    names = set(dict(module.named_parameters(recurse=False)))
    if names not in ({*WEIGHTS}, {*WEIGHTS, *BIASES}) or not hasattr(module, "_apply_gate"):
        return False
    if any(True for _ in module.buffers(recurse=False)):
        return False
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        return False
    up, down = module.gate_up_proj, module.down_proj
    if up.ndim != 3 or down.ndim != 3:
        return False
    if getattr(module, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    experts, hidden, inner = down.shape
    fits: bool = up.shape == (experts, 2 * inner, hidden)
    return fits
