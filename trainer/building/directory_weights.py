"""The weights of a model directory, read in order; quantized ones are dequantized one by one."""

from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.weight_names import CheckpointNames, may_be_absent
from headrace.trainer.architecture.weights import WeightFiles
from headrace.trainer.quantized.formats import restore
from headrace.trainer.quantized.frozen_weight import FrozenWeight
from headrace.trainer.stored.formats import stored_weights

CPU = torch.device("cpu")


CODES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0")  # that quantized weights are of


def in_float32(name: str) -> torch.dtype:
    """Return float32 for any parameter."""
    return torch.float32


class StoredWeights:
    """The weights of a model directory; quantized ones are dequantized one by one.

    Args:
        model: without adapters, on the meta device; only says what the names mean.
        dtype_of: the type that a parameter is dequantized to, by its name.
        device: where that is done.
        kept: parameters that are given as bitsandbytes has quantized them.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        dtype_of: Callable[[str], torch.dtype] = in_float32,
        device: torch.device = CPU,
        kept: Container[str] = (),
    ) -> None:
        self.files = WeightFiles(directory)
        self.quantized = stored_weights(directory, self.files.tensors, model)
        parts = {part for weight in self.quantized.values() for part in weight.parts.values()}
        whole = self.files.tensors.keys() - parts | self.quantized.keys()
        self.names = CheckpointNames(model, whole)
        self.dtype_of = dtype_of
        self.device = device
        self.kept = kept
        self._floating = {
            name for name, value in model.state_dict().items() if value.is_floating_point()
        }

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.__exit__(*error)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | FrozenWeight]:
        """Yield the values that `WeightSource` promises; several workers read ahead.

        Raises:
            DataError: the checkpoint lacks one, or has it in another shape than config.json says.
        """
        groups = [self._parts(name) for name, _ in wanted]
        read = self.files.read_groups([list(parts.values()) for parts in groups])
        for (name, shape), parts, tensors in zip(wanted, groups, read, strict=True):
            by_part = dict(zip(parts, tensors, strict=True))
            tensors.clear()
            value = self._value(name, by_part)
            if value.shape != shape:
                path = self.files.tensors[next(iter(parts.values()))].path
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

    def _parts(self, name: str) -> dict[tuple[str, str], str]:
        """Return the stored tensors to read for a parameter, by weight in the files and part of it.

        Raises:
            DataError: there are none, or integers that nothing turns into numbers.
        """
        if name not in self.names:
            raise DataError(
                f"{self.files.directory}: the checkpoint has no tensor {name}, "
                "which config.json calls for"
            )
        found: dict[tuple[str, str], str] = {}
        for weight in self.names.stored(name):
            if weight in self.quantized:
                parts = self.quantized[weight].parts
                found |= {(weight, part): stored for part, stored in parts.items()}
                continue
            stored = self.files.tensors[weight]
            if name in self._floating and stored.dtype in CODES:
                raise DataError(
                    f"{stored.path}: {weight} holds {stored.dtype} without the scales that its "
                    "format would have; fetch the model again, config.json too"
                )
            found[weight, ""] = weight
        return found

    def _value(self, name: str, by_part: dict[tuple[str, str], Tensor]) -> Tensor | FrozenWeight:
        """Return a parameter's value from its stored tensors, which are taken out of `by_part`."""
        weights = self.names.stored(name)
        if name in self.kept:
            return restore({part: tensor for (_, part), tensor in by_part.items()})
        tensors = []
        for weight in weights:
            own = {part: by_part.pop((of, part)) for of, part in list(by_part) if of == weight}
            if weight in self.quantized:
                own = {part: tensor.to(self.device) for part, tensor in own.items()}
                value = self.quantized[weight].dequantize(own, self.dtype_of(name))
                # as many together as a layer has experts do not have to lie on the device
                tensors.append(value if len(weights) == 1 else value.cpu())
            else:
                tensors.append(own[""])
        return self.names.convert(name, tensors)
