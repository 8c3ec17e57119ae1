"""Modules whose frozen weights are held quantized, in the place of transformers' own."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.trainer.quantized.frozen_weight import FrozenWeight


class QuantizableModule(nn.Module):
    """A module with weights that may be held quantized.

    Until `set_quantized` is called, and for weights that are trained, they are ordinary parameters.

    Attributes:
        weights: which of its parameters.
        bits: of those that are to be quantized unless they are trained, what one number will take,
            its share of scales included.
        compute_dtype: type of the computation with quantized weights.
    """

    weights: tuple[str, ...] = ("weight",)
    bits: Mapping[str, float] = MappingProxyType({})
    compute_dtype = torch.float32

    def set_quantized(self, attribute: str, value: FrozenWeight, dtype: torch.dtype) -> None:
        """Replace a parameter.

        Args:
            dtype: of the computation.
        """
        self._parameters[attribute] = None
        self._modules[f"quantized_{attribute}"] = value
        self.compute_dtype = dtype

    def quantized(self, attribute: str) -> FrozenWeight | None:
        """Return the quantized weight that replaces a parameter, or None."""
        found = self._modules.get(f"quantized_{attribute}")
        return found if isinstance(found, FrozenWeight) else None

    def as_held(self, value: Tensor) -> Tensor:
        """Return a parameter as it is quantized, inputs last; twice is the parameter again."""
        return value

    def shape_of(self, attribute: str) -> torch.Size:
        """Return the shape of the parameter that is held quantized."""
        held = self.quantized(attribute)
        assert held is not None
        return self.as_held(torch.empty(held.shape, device="meta")).shape

    def dequantized(self, attribute: str) -> Tensor:
        """Return what is held for a parameter, as the parameter was, in float32."""
        held = self.quantized(attribute)
        assert held is not None
        return self.as_held(held.dequantize(torch.float32))

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
            return held.dequantize(self.compute_dtype)
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
        return held.linear(states, self.bias, self.threshold).to(input.dtype)


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
        rows = held.rows(input, self.compute_dtype) if held else super().forward(input)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale).to(rows.dtype)


def quantized_places(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, QuantizableModule, str]]:
    """Yield where weights are held quantized: name as a parameter, module and attribute."""
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, QuantizableModule):
                for attribute in part.weights:
                    if part.quantized(attribute) is not None:
                        yield ".".join(filter(None, (prefix, name, attribute))), part, attribute


def quantized_weights_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, FrozenWeight]]:
    """Yield all quantized weights below named modules, by their names as parameters."""
    for name, part, attribute in quantized_places(modules):
        held = part.quantized(attribute)
        assert held is not None
        yield name, held
