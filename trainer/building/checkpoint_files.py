"""Files of a checkpoint and names of the tensors in them, read from whichever holds them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.schemas.errors import CheckpointError
from headrace.schemas.train.run_state import REMEDY, stage_files

PARAMETER = "parameter"  # kinds of tensors; others are named after an optimizer's states
MERGED = "merged"  # adapters that restarts have added to the frozen weights, [restarts, ...]
INITIAL = "initial"  # adapters as they started, where they took over frozen weights
AVERAGED = "z"  # state of schedule-free optimizers that the average is computed from


def tensor_name(kind: str, name: str) -> str:
    """Return the name in a checkpoint of a parameter's value or state."""
    return f"{kind}/{name}"


def stage_file(stage: int) -> str:
    """Return the name of a stage's file."""
    return f"stage-{stage:02d}.safetensors"


@dataclass(frozen=True)
class Written:
    """Files that one rank has put into a checkpoint: name -> SHA-256; or why it could not."""

    files: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


class CheckpointTensors:
    """The tensors of all stage files of a checkpoint, read one at a time.

    Args:
        beta1: of a schedule-free optimizer, whose weights are averages; None for others.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, directory: Path, beta1: float | None = None) -> None:
        self.directory = directory
        self.beta1 = beta1
        self._files: dict[str, Any] = {}
        for path in stage_files(directory):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); {REMEDY}") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def named(self, kind: str) -> list[str]:
        """List the parameters that have a tensor of this kind."""
        prefix = tensor_name(kind, "")
        return [name.removeprefix(prefix) for name in self._files if name.startswith(prefix)]

    def get(self, kind: str, name: str, shape: torch.Size | None = None) -> Tensor:
        """Read a tensor.

        Args:
            shape: that it must have.

        Raises:
            CheckpointError: it is missing or of another shape.
        """
        key = tensor_name(kind, name)
        if key not in self._files:
            raise CheckpointError(f"{self.directory}: no tensor {key}; it belongs to another run")
        tensor: Tensor = self._files[key].get_tensor(key)
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self.directory}: {key} has shape {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor

    def all(self, kind: str) -> dict[str, Tensor]:
        """Read all tensors of a kind, by the parameters' names."""
        return {name: self.get(kind, name) for name in self.named(kind)}

    def parameter(self, name: str) -> Tensor:
        """Read a trained weight as it is used."""
        value = self.get(PARAMETER, name)
        if self.beta1 is None:
            return value
        return average(value, self.get(AVERAGED, name), self.beta1)


def average(parameter: Tensor, z: Tensor, beta1: float) -> Tensor:
    """Return the weight that is used, of one that schedule-free trains and its z."""
    return torch.lerp(parameter, z, 1 - 1 / beta1)
