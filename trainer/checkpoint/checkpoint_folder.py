"""Checkpoints: tensors by name, so any layout can read them; published whole or not at all."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from headrace.schemas.checkpoint_names import (
    CHECKPOINTS_FOLDER,
    checkpoint_name,
    published_checkpoints,
)
from headrace.schemas.publish import remove_tree, rename_durably
from headrace.schemas.train.run_state import RunState, read_run_state, write_run_state
from headrace.trainer.building.checkpoint_files import PARAMETER, CheckpointTensors, tensor_name
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.checkpoint.retention import expired
from headrace.trainer.optim.states import restore, tensors_of


class CheckpointFolder:
    """The `checkpoints` folder of a run."""

    def __init__(self, run_directory: Path, keep_last: int, *, keep_best: bool = False) -> None:
        self.path = run_directory / CHECKPOINTS_FOLDER
        self.keep_last = keep_last
        self.keep_best = keep_best

    def finished(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return published_checkpoints(self.path)

    def remove_leftovers(self) -> None:
        """Remove what a killed process had half written or half removed."""
        for path in self.path.glob(".step-*"):
            shutil.rmtree(path)

    def unfinished(self, step: int) -> Path:
        """Return the folder of a checkpoint's files until all of them are written."""
        return self.path / f".{checkpoint_name(step)}.tmp"

    def publish(self, state: RunState) -> Path:
        """Put a checkpoint whose stage files are durable in its place; older ones go after that.

        Args:
            state: with the stage files and their hashes.

        Returns:
            The path of the checkpoint.
        """
        final = self.path / checkpoint_name(state.step)
        write_run_state(self.unfinished(state.step), state)
        if final.exists():
            remove_tree(final)
        rename_durably(self.unfinished(state.step), final)
        best = state.best_step if self.keep_best else None
        for path in expired(self.finished(), self.keep_last, best):
            remove_tree(path)
        return final


def collect_tensors(
    trained: Sequence[TrainedParameter],
    optimizer: torch.optim.Optimizer | None,
    kept: Mapping[str, Tensor] | None = None,
    *,
    copy: bool = False,
) -> dict[str, Tensor]:
    """Parameters and optimizer states under canonical names, copies of tied weights left out.

    They are whole: ranks that share weights call this together.

    Args:
        optimizer: None leaves the states out.
        kept: further tensors, under the names that they get.
        copy: into memory of their own, so that the next step cannot change them.
    """

    def on_host(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=copy).contiguous()

    tensors = {}
    for item in trained:
        if item.owned:
            tensors[tensor_name(PARAMETER, item.name)] = on_host(item.whole(item.parameter))
            states = {} if optimizer is None else tensors_of(optimizer, item.parameter)
            for state, value in states.items():
                tensors[tensor_name(state, item.name)] = on_host(item.whole(value))
    return tensors | dict(kept or {})


def load_tensors(
    directory: Path, trained: Sequence[TrainedParameter], optimizer: torch.optim.Optimizer | None
) -> None:
    """Read this stage's parameters and optimizer states from whatever stage files hold them.

    Args:
        optimizer: None for a checkpoint of weights alone.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    stored = CheckpointTensors(directory)

    def read_state(item: TrainedParameter, state: str, shape: torch.Size) -> Tensor:
        if shape != item.parameter.shape:
            return stored.get(state, item.name, shape)
        return item.part(stored.get(state, item.name, item.shape))

    for item in trained:
        parameter = item.parameter
        with torch.no_grad():
            parameter.copy_(item.part(stored.get(PARAMETER, item.name, item.shape)))
        if optimizer is not None:
            restore(optimizer, parameter, partial(read_state, item))


def newest(
    folder: CheckpointFolder, *, check_files: bool, among: Collection[str] | None = None
) -> tuple[Path, RunState] | None:
    """The newest checkpoint and its state; None if there is none.

    Args:
        among: names of checkpoints, of which the newest is taken.

    Raises:
        CheckpointError: it is damaged. Nothing older is taken in silence.
    """
    finished = [path for path in folder.finished() if among is None or path.name in among]
    if not finished:
        return None
    return finished[-1], read_run_state(finished[-1], check_files=check_files)
