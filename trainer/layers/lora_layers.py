"""LoRA layers that compute in the type of their input, over the parts of PEFT's."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from headrace.kernels.lora_linear import (
    add_adapter,
    join,
    joined_lora_linear,
    lora_linear,
    low_ranks,
)

ADAPTER = "default"  # the only one that a run trains
WIDE = 2  # outputs over inputs from which adapter and frozen weight are multiplied as one
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in most families


class LoraLinear(nn.Module):
    """A PEFT LoRA layer's parts under the same names, computed in the type of the input.

    A frozen weight of a wide layer lies beside its adapter's B in one matrix, `joined`; `refresh`
    brings that copy of B up to date before a step.
    """

    joined: Tensor | None
    group: "SharedInput | None" = None  # of layers with the same input
    place: int = 0  # of this one among them

    def __init__(self, layer: PeftLinear, *, may_join: bool) -> None:
        super().__init__()
        self.base_layer: Any = layer.base_layer
        self.lora_A = layer.lora_A
        self.lora_B = layer.lora_B
        self.drop = layer.lora_dropout[ADAPTER]
        self.dropout = getattr(self.drop, "p", 0.0)
        self.scale = layer.scaling[ADAPTER]
        base = self.base_layer
        joins = may_join and is_wide(base) and self.dropout == 0
        joined = join(base.weight.data, layer.r[ADAPTER]) if joins else None
        self.register_buffer("joined", joined, persistent=False)
        if joined is not None:
            base.weight.data = joined[:, : base.in_features]  # the same values, held once

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        if self.joined is not None:
            return joined_lora_linear(x, self.joined, a, b, self.scale)
        base = self.base_layer(x)
        if self.group is not None:
            return add_adapter(base, self.group.low_rank(self.place, x), b, self.scale)
        return lora_linear(self.drop(x), base, a, b, self.scale)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for modules that look at it."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, likewise."""
        bias: Tensor | None = self.base_layer.bias
        return bias

    @property
    def is_separate(self) -> bool:
        """Return whether the adapter has a product of its own, of the input as it is."""
        return self.joined is None and self.dropout == 0

    @staticmethod
    @torch.no_grad()
    def refresh(layers: Sequence["LoraLinear"]) -> None:
        """Copy every B, scaled, to its place beside the frozen weight."""
        joined = [(layer, layer.joined) for layer in layers if layer.joined is not None]
        if joined:
            scaled = [layer.lora_B[ADAPTER].weight * layer.scale for layer, _ in joined]
            places = [matrix[:, layer.base_layer.in_features :] for layer, matrix in joined]
            torch._foreach_copy_(places, scaled)


def is_wide(base: nn.Module) -> bool:
    """A plain linear layer, not quantized, with far more outputs than inputs."""
    if type(base) is not nn.Linear or getattr(base, "bias", None) is not None:
        return False
    return base.out_features >= WIDE * base.in_features


class SharedInput:
    """Layers that are called one after the other with the same input, as q, k and v are.

    The first of them multiplies it with all their first factors at once, the last lets go of them.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self.input: Tensor | None = None
        self.low: list[Tensor] = []

    def low_rank(self, place: int, x: Tensor) -> Tensor:
        """Return x @ A.T of one of the layers."""
        if self.input is not x:
            factors = [part.lora_A[ADAPTER].weight for part in self.layers]
            self.input, self.low = x, low_ranks(x, factors)
        low = self.low[place]
        if place == len(self.layers) - 1:
            self.input, self.low = None, []
        return low


def swap_adapters(layer: nn.Module, *, may_join: bool) -> list[LoraLinear]:
    """Put a `LoraLinear` in the place of each plain LoRA layer, over the same parameters.

    Args:
        may_join: they may be multiplied along with weights and with other adapters.
    """
    swapped = []
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PeftLinear and is_plain(child):
                swapped.append(LoraLinear(child, may_join=may_join))
                setattr(parent, name, swapped[-1])
        if may_join:
            share_inputs(parent)
    return swapped


def is_plain(layer: PeftLinear) -> bool:
    """One LoRA adapter, and no variant such as DoRA, which computes something else."""
    return (
        list(layer.lora_A) == [ADAPTER] and not layer.lora_variant and not layer.lora_bias[ADAPTER]
    )


def share_inputs(parent: nn.Module) -> None:
    """Let layers of a module that are given the same input share a product; in place."""
    for names in SAME_INPUT:
        found = [getattr(parent, name, None) for name in names]
        layers = [layer for layer in found if isinstance(layer, LoraLinear) and layer.is_separate]
        if len(layers) > 1:
            group = SharedInput(layers)
            for place, layer in enumerate(layers):
                layer.group, layer.place = group, place
