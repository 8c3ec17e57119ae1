"""The weights of a model directory, read in order; quantized ones are dequantized one by one."""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import visible
from headrace.trainer.architecture.model_files import Slice
from headrace.trainer.architecture.weight_names import CheckpointNames, may_be_absent
from headrace.trainer.architecture.weights import WeightFiles
from headrace.trainer.building.weight_source import NO_CUTS
from headrace.trainer.quantized.formats import restore
from headrace.trainer.quantized.frozen_weight import FrozenWeight
from headrace.trainer.stored.formats import stored_weights

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
SHOWN = 3  # tensors that a message names

FLOATS = ("F64", "F32", "F16", "BF16")  # all others are codes, of quantized weights or of none


def in_float32(name: str) -> torch.dtype:
    """Return float32 for any parameter."""
    return torch.float32


@dataclass(frozen=True)
class Asked:
    """Description of what is read for a parameter.

    Attributes:
        parts: stored tensors by weight in the files and part of it.
        shape: of the value that they make.
        cut: of the only tensor.
    """

    parts: Mapping[tuple[str, str], str]
    shape: torch.Size
    cut: Slice | None = None


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

        self._check_numbers()

    def _check_numbers(self) -> None:
        """Check that what is read as numbers is stored as such, before anything is read.

        Raises:
            DataError: integers that nothing turns into numbers.
        """
        for parameter, source in self.names.sources.items():
            if parameter not in self._floating:
                continue
            for weight in source.names:
                stored = self.files.tensors.get(weight)
                if stored and weight not in self.quantized and stored.dtype not in FLOATS:
                    raise DataError(
                        f"{stored.path}: {weight} holds {stored.dtype} without the scales that its "
                        "format would have; fetch the model again, config.json too"
                    )

    def unexpected(self) -> list[str]:
        """List the tensors in the files that the model does not call for, but for those that
        quantized formats have beside weights.
        """
        found = self.names.unexpected()
        if not self.quantized:
            return found
        modules = {name.rpartition(".")[0] for name in self.quantized}
        split = [(name, *name.rpartition(".")[::2]) for name in found]
        return [
            name
            for name, module, part in split
            if part in ("weight", "bias") and module not in modules
        ]

    def tell_unexpected(self) -> None:
        """Say once what in the files is not used, as transformers does when it loads a model."""
        found = self.unexpected()
        if found:
            shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
            logger.info(
                "warning: %s: %d of %d tensors are not in the model that config.json describes; "
                "they are neither run nor written again: %s",
                self.files.directory,
                len(found),
                len(self.files.tensors),
                visible(shown),
            )

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.__exit__(*error)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(
        self, wanted: Sequence[tuple[str, torch.Size]], cuts: Mapping[str, Slice] = NO_CUTS
    ) -> Iterator[Tensor | FrozenWeight]:
        """Yield the values that `WeightSource` promises; several workers read ahead.

        Raises:
            DataError: the checkpoint lacks one, or has it in another shape than config.json says.
        """
        asked = [self._asked(name, shape, cuts.get(name)) for name, shape in wanted]
        groups = [list(one.parts.values()) for one in asked]
        read = self.files.read_groups(groups, [one.cut for one in asked])
        for (name, shape), one, tensors in zip(wanted, asked, read, strict=True):
            by_part = dict(zip(one.parts, tensors, strict=True))
            tensors.clear()
            value = self._value(name, by_part)
            if value.shape != one.shape:
                path = self.files.tensors[next(iter(one.parts.values()))].path
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

    def _asked(self, name: str, shape: torch.Size, cut: Slice | None) -> "Asked":
        """Return what to read for a parameter, or for a part of it where it can be told in files.

        Raises:
            DataError: as `_parts`.
        """
        if name not in self.names:
            raise DataError(
                f"{self.files.directory}: the checkpoint has no tensor {name}, "
                "which config.json calls for"
            )
        weights = self.names.stored(name)
        if cut is None or name in self.kept:
            return Asked(self._parts(name, weights), shape)
        part = torch.Size(cut.shape(shape))
        some = self.names.of_some(name, shape[0], cut.start, cut.stop) if cut.dim == 0 else weights
        if len(some) < len(weights):
            return Asked(self._parts(name, some), part)
        plain = len(weights) == 1 and weights[0] not in self.quantized
        if plain and self.names.is_as_stored(name) and self._shape(weights[0]) == shape:
            return Asked(self._parts(name, weights), part, cut)
        return Asked(self._parts(name, weights), shape)

    def _shape(self, weight: str) -> tuple[int, ...]:
        stored = self.files.tensors[weight]
        return () if stored.blocks is not None else stored.shape

    def _parts(self, name: str, weights: Sequence[str]) -> dict[tuple[str, str], str]:
        """Return the stored tensors to read for a parameter, by weight and part of it."""
        found: dict[tuple[str, str], str] = {}
        for weight in weights:
            if weight in self.quantized:
                parts = self.quantized[weight].parts
                found |= {(weight, part): stored for part, stored in parts.items()}
                continue
            found[weight, ""] = weight
        return found

    def _value(self, name: str, by_part: dict[tuple[str, str], Tensor]) -> Tensor | FrozenWeight:
        """Return a parameter's value from its stored tensors, which are taken out of `by_part`."""
        if name in self.kept:
            return restore({part: tensor for (_, part), tensor in by_part.items()})
        weights = list(dict.fromkeys(weight for weight, _ in by_part))
        tensors = {}
        for weight in weights:
            own = {part: by_part.pop((of, part)) for of, part in list(by_part) if of == weight}
            if weight in self.quantized:
                own = {part: tensor.to(self.device) for part, tensor in own.items()}
                value = self.quantized[weight].dequantize(own, self.dtype_of(name))
                # as many together as a layer has experts do not have to lie on the device
                tensors[weight] = value if len(weights) == 1 else value.cpu()
            else:
                tensors[weight] = own[""]
        return self.names.convert(name, tensors)
