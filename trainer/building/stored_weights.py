"""The weights of a model directory, read in order, quantized or not."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.weight_names import CheckpointNames, may_be_absent
from headrace.trainer.architecture.weights import WeightFiles
from headrace.trainer.quantized.formats import companions, restore
from headrace.trainer.quantized.frozen_weight import FrozenWeight


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

    def read(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | FrozenWeight]:
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
            value: Tensor | FrozenWeight
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
