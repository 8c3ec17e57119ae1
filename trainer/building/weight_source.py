"""A source of a model's weights, and the one that initializes them at random."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.quantized.frozen_weight import FrozenWeight


class WeightSource(Protocol):
    """Gives parameters' values in order, by their names in the model without adapters."""

    def __enter__(self) -> "WeightSource": ...

    def __exit__(self, *error: object) -> None: ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | FrozenWeight]:
        """The values of parameters, in this order, each of its shape and of any type."""
        ...

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """The values of persistent buffers, likewise; None leaves one as it was constructed."""
        ...


class RandomWeights:
    """Weights as transformers would initialize them, a function of seed and name alone."""

    def __init__(self, model: Any, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        text = model.config.get_text_config()
        self.deviation = getattr(text, "initializer_range", None) or 0.02

    def __enter__(self) -> "RandomWeights":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor]:
        """Yield the values that `WeightSource` promises, made on the device."""
        for name, shape in wanted:
            if len(shape) > 1:
                generator = torch.Generator(self.device)
                generator.manual_seed(derive_seed(self.seed, "weights", name))
                value = torch.empty(shape, device=self.device)
                yield value.normal_(std=self.deviation, generator=generator)
            else:
                yield self._vector(name, shape)

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """Return None for each: all stay as they were constructed."""
        return iter([None] * len(wanted))

    def _vector(self, name: str, shape: torch.Size) -> Tensor:
        """Biases are 0, norms as the model's own initialization sets them."""
        owner, _, attribute = name.rpartition(".")
        if attribute.endswith("bias"):
            return torch.zeros(shape)
        module = copy.deepcopy(self.model.get_submodule(owner)).to_empty(device="cpu")
        vector: nn.Parameter = getattr(module, attribute)
        nn.init.ones_(vector)
        self.model._init_weights(module)
        return vector.detach()
