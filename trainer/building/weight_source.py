"""Sources of a model's weights: its files, or random initialization."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.architecture.weight_names import CheckpointNames, may_be_absent
from headrace.trainer.architecture.weights import WeightFiles
from headrace.trainer.quantized.formats import companions, restore
from headrace.trainer.quantized.weight import QuantizedWeight


class WeightSource(Protocol):
    """Gives parameters' values in order, by their names in the model without adapters."""

    def __enter__(self) -> "WeightSource": ...

    def __exit__(self, *error: object) -> None: ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | QuantizedWeight]:
        """The values of parameters, in this order, each of its shape and of any type."""
        ...

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """The values of persistent buffers, likewise; None leaves one as it was constructed."""
        ...


class StoredWeights:
    """The weights of a model directory.

    Args:
        model: without adapters, on the meta device; only says what the names mean.
    """

    def __init__(self, directory: Path, model: nn.Module) -> None:
        self.files = WeightFiles(directory)
        self.names = CheckpointNames(model, self.files.tensors)

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.__exit__(*error)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | QuantizedWeight]:
        """Yield the values that `WeightSource` promises; several workers read ahead.

        What bitsandbytes has quantized is given as it is.

        Raises:
            DataError: the checkpoint lacks one, or has it in another shape than config.json says.
        """
        for name, _ in wanted:
            self._check_present(name)
        stored = [self._stored(name) for name, _ in wanted]
        groups = self.files.read_groups([list(files.values()) for files in stored])
        for (name, shape), files, tensors in zip(wanted, stored, groups, strict=True):
            value: Tensor | QuantizedWeight
            if "" in files:
                value = restore(dict(zip(files, tensors, strict=True)))
            else:
                value = self.names.convert(name, tensors)
            del tensors
            if value.shape != shape:
                path = self.files.tensors[self.names.stored(name)[0]].path
                raise DataError(
                    f"{path}: {name} has shape {list(value.shape)}, config.json says {list(shape)}"
                )
            yield value

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """Read buffers as `WeightSource` promises.

        Raises:
            DataError: as `read`, unless transformers does not ask for the buffer either.
        """
        for name, shape in wanted:
            if name not in self.names and may_be_absent(self.names.model, name):
                yield None
                continue
            (value,) = self.read([(name, shape)])
            assert isinstance(value, Tensor)
            yield value

    def _check_present(self, name: str) -> None:
        if name not in self.names:
            raise DataError(
                f"{self.files.directory}: the checkpoint has no tensor {name}, "
                "which config.json calls for"
            )

    def _stored(self, name: str) -> dict[str, str]:
        """Return the stored tensors to read for a parameter.

        Of one that is quantized, the codes are under "".
        """
        names = self.names.stored(name)
        if len(names) == 1:
            parts = companions(names[0], self.files.tensors)
            return {"": names[0], **parts} if parts else {names[0]: names[0]}
        for part in names:
            if companions(part, self.files.tensors):
                raise DataError(
                    f"{self.files.directory}: {part} is quantized apart from the others that make "
                    f"up {name}; use the model that it was made of"
                )
        return {part: part for part in names}


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
