"""LoRA on fused experts as low-rank products of the tokens that each expert is sent.

PEFT adds the change of all experts to all their weights; here the change of a weight is never
formed.
"""

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from headrace.trainer.layers.experts import ExpertAdapter, GroupedExperts


class AdaptedExperts(nn.Module):
    """Takes the place of PEFT's wrapper around experts, over the same parameters."""

    def __init__(self, wrapper: ParamWrapper) -> None:
        super().__init__()
        self.base_layer: Any = wrapper.base_layer
        if isinstance(self.base_layer, ParamWrapper):
            self.base_layer = AdaptedExperts(self.base_layer)
        self.lora_A, self.lora_B = wrapper.lora_A, wrapper.lora_B
        self.parameter_name = wrapper.parameter_name
        (self.adapter,) = wrapper.lora_A
        self.scale = wrapper.scaling[self.adapter]

    @property
    def num_experts(self) -> int:
        """Return how many experts are held here."""
        count: int = self.base_layer.num_experts
        return count

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return what `GroupedExperts` does, with this adapter and those below."""
        return self.adapted(hidden_states, top_k_index, top_k_weights, {})

    def adapted(
        self,
        hidden: Tensor,
        chosen: Tensor,
        weights: Tensor,
        adapters: Mapping[str, ExpertAdapter],
    ) -> Tensor:
        """Add this adapter to the others, and run the experts below."""
        mine = {self.parameter_name: self._factors()}
        output: Tensor = self.base_layer.adapted(hidden, chosen, weights, {**adapters, **mine})
        return output

    def _factors(self) -> ExpertAdapter:
        """PEFT lies experts apart in the rows of A, and side by side in the ranks of B."""
        down, up = self.lora_A[self.adapter].weight, self.lora_B[self.adapter].weight
        return ExpertAdapter(
            down.view(self.num_experts, -1, down.shape[1]),
            up.view(up.shape[0], -1, self.num_experts).permute(2, 0, 1),
            self.scale,
        )


def swap_expert_adapters(module: nn.Module) -> None:
    """Put `AdaptedExperts` in the place of PEFT's wrappers around experts of ours; in place."""
    for name, child in list(module.named_children()):
        if not isinstance(child, ParamWrapper):
            swap_expert_adapters(child)
        elif isinstance(child.get_base_layer(), GroupedExperts) and only_weights(child):
            setattr(module, name, AdaptedExperts(child))


def only_weights(wrapper: ParamWrapper) -> bool:
    """Return whether a wrapper, and those in it, adapt the experts' matrices and no biases."""
    if wrapper.parameter_name not in GroupedExperts.weights:
        return False
    inner = wrapper.base_layer
    return only_weights(inner) if isinstance(inner, ParamWrapper) else True
