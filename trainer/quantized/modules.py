"""Modules whose frozen weights are held quantized, in the place of transformers' own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from headrace.kernels.lora_linear import lora_linear
from headrace.trainer.quantized.weight import QuantizedWeight


class QuantizableModule(nn.Module):
    """A module with weights that may be held quantized.

    Until `set_quantized` is called, and for weights that are trained, they are ordinary parameters.

    Attributes:
        weights: which of its parameters.
        bits: of each of them, what one number will take, its share of scales included.
        compute_dtype: type of the computation with quantized weights.
    """

    weights: tuple[str, ...] = ("weight",)
    bits: dict[str, float]
    compute_dtype = torch.float32

    def set_quantized(
        self, attribute: str, values: list[QuantizedWeight], dtype: torch.dtype
    ) -> None:
        """Replace a parameter: by one matrix, or one for each expert.

        Args:
            dtype: of the computation.
        """
        self._parameters[attribute] = None
        self._modules[f"quantized_{attribute}"] = nn.ModuleList(values)
        self.compute_dtype = dtype

    def quantized(self, attribute: str) -> list[QuantizedWeight] | None:
        """Return the quantized weights that replace a parameter, or None."""
        found = self._modules.get(f"quantized_{attribute}")
        if not isinstance(found, nn.ModuleList):
            return None
        return [part for part in found if isinstance(part, QuantizedWeight)]

    def share(self, other: "QuantizableModule") -> None:
        """Use the weight of another module: a tied embedding's."""
        self._parameters["weight"] = None
        self.compute_dtype = other.compute_dtype
        self._modules["quantized_weight"] = other._modules["quantized_weight"]

    @property
    def dequantized_weight(self) -> Tensor:
        """The parameter, or what is held for it, dequantized."""
        parameter, held = self._parameters["weight"], self.quantized("weight")
        if held is not None:
            return held[0].dequantize(self.compute_dtype)
        assert parameter is not None
        return parameter


class QuantizedLinear(QuantizableModule, nn.Linear):
    """A linear layer."""

    def __init__(self, layer: nn.Linear, threshold: float | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._parameters |= layer._parameters
        self.threshold = threshold

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized_weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's)
        held = self.quantized("weight")
        if held is None:
            return functional.linear(input, self.weight, self.bias)
        states = input.to(self.compute_dtype)
        return held[0].linear(states, self.bias, self.threshold).to(input.dtype)


class QuantizedEmbedding(QuantizableModule, nn.Embedding):
    """An embedding; rows are dequantized as they are looked up."""

    def __init__(self, layer: nn.Embedding) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(layer, name))
        self._parameters |= layer._parameters
        self.scale = getattr(layer, "scalar_embed_scale", 1.0)  # gemma's

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized_weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Embedding's)
        held = self.quantized("weight")
        rows = held[0].rows(input, self.compute_dtype) if held else super().forward(input)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale).to(rows.dtype)


@dataclass(frozen=True)
class ExpertAdapter:
    """LoRA on one matrix of every expert."""

    down: Tensor  # [experts, rank, inputs]
    up: Tensor  # [experts, outputs, rank]
    scale: float


class QuantizedExperts(QuantizableModule):
    """The experts of a mixture, each with matrices of its own.

    Adapters on them, of PEFT's kind for parameters, are computed as low-rank products of the tokens
    that an expert is sent: the adapted weights are never formed.
    """

    weights = ("gate_up_proj", "down_proj")

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._parameters |= experts._parameters
        self.num_experts: int = experts.gate_up_proj.shape[0]
        self.act_fn = experts.act_fn

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden size] in and out; `chosen` and `weights` are [tokens, experts each]."""
        return self.adapted(hidden, chosen, weights, {})

    def adapted(
        self,
        hidden: Tensor,
        chosen: Tensor,
        weights: Tensor,
        adapters: Mapping[str, ExpertAdapter],
    ) -> Tensor:
        """Run as `forward` does, with adapters on the matrices that they are named by."""
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            if expert == self.num_experts:
                continue  # transformers' mark for tokens that go nowhere
            tokens, place = torch.where(chosen == expert)
            states = hidden[tokens]
            gate, up = self._matrix("gate_up_proj", expert, states, adapters).chunk(2, dim=-1)
            states = self._matrix("down_proj", expert, self.act_fn(gate) * up, adapters)
            total.index_add_(0, tokens, (states * weights[tokens, place, None]).to(total.dtype))
        return total

    def _matrix(
        self,
        name: str,
        expert: int,
        states: Tensor,
        adapters: Mapping[str, ExpertAdapter],
    ) -> Tensor:
        held = self.quantized(name)
        if held is None:
            output = functional.linear(states, self._parameters[name][expert])  # type: ignore[index]
        else:
            output = held[expert].linear(states.to(self.compute_dtype), None).to(states.dtype)
        if name in adapters:
            adapter = adapters[name]
            down, up = adapter.down[expert], adapter.up[expert]
            output = lora_linear(states, output, down, up, adapter.scale)
        return output


class AdaptedExperts(nn.Module):
    """Takes the place of PEFT's wrapper around quantized experts, over the same parameters.

    PEFT adds the change of all experts to all their weights, which are not there as a whole.
    """

    def __init__(self, wrapper: ParamWrapper) -> None:
        super().__init__()
        self.base_layer: Any = wrapper.base_layer
        if isinstance(self.base_layer, ParamWrapper):
            self.base_layer = AdaptedExperts(self.base_layer)
        self.lora_A, self.lora_B = wrapper.lora_A, wrapper.lora_B
        self.parameter_name = wrapper.parameter_name
        (self.adapter,) = wrapper.lora_A
        self.scale = wrapper.scaling[self.adapter]

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.adapted(hidden, chosen, weights, {})

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
        layer = self.base_layer
        while isinstance(layer, AdaptedExperts):
            layer = layer.base_layer
        return ExpertAdapter(
            down.view(layer.num_experts, -1, down.shape[1]),
            up.view(up.shape[0], -1, layer.num_experts).permute(2, 0, 1),
            self.scale,
        )


def swap_expert_adapters(module: nn.Module) -> None:
    """Put `AdaptedExperts` in the place of PEFT's wrappers around experts that are quantized."""
    for name, child in list(module.named_children()):
        if isinstance(child, ParamWrapper):
            experts = child.get_base_layer()
            if isinstance(experts, QuantizedExperts) and any(
                map(experts.quantized, experts.weights)
            ):
                setattr(module, name, AdaptedExperts(child))
        else:
            swap_expert_adapters(child)


def quantized_weights_of(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, list[QuantizedWeight]]]:
    """Yield all quantized weights below named modules, by their names as parameters."""
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, QuantizableModule):
                for attribute in part.weights:
                    held = part.quantized(attribute)
                    if held is not None:
                        yield ".".join(filter(None, (prefix, name, attribute))), held
