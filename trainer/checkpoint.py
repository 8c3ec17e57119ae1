"""Checkpoints: tensors by name, so any layout can read them; published whole or not at all."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from headrace.schemas.errors import CheckpointError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.publish import fsync_path, remove_tree, rename_durably
from headrace.schemas.run_state import RunState, read_run_state, write_run_state
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.model_builder import TrainedParameter
from headrace.trainer.optimizer import state_names

NAME = re.compile(r"step-(\d+)")


class CheckpointFolder:
    """The `checkpoints` folder of a run."""

    def __init__(self, run_directory: Path, keep_last: int) -> None:
        self.path = run_directory / "checkpoints"
        self.keep_last = keep_last

    def finished(self) -> list[Path]:
        """Published checkpoints, oldest first. Half-written ones have other names."""
        if not self.path.is_dir():
            return []
        found = [
            (match, path) for path in self.path.iterdir() if (match := NAME.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found, key=lambda item: int(item[0][1]))]

    def remove_leftovers(self) -> None:
        """Remove what a killed process had half written or half removed."""
        for path in self.path.glob(".step-*"):
            shutil.rmtree(path)

    def save(
        self,
        state: RunState,
        trained: Sequence[TrainedParameter],
        optimizer: torch.optim.Optimizer,
        layout: Layout,
    ) -> Path:
        """Write one checkpoint; every rank takes part. Returns its path."""
        final = self.path / f"step-{state.step:06d}"
        temporary = self.path / f".{final.name}.tmp"
        if layout.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier(layout.world_group)
        written = {}
        if layout.replica == 0:
            path = temporary / f"stage-{layout.stage:02d}.safetensors"
            save_file(collect_tensors(trained, optimizer), path)
            fsync_path(path)
            written[path.name] = file_sha256(path)
        files = {
            name: digest
            for part in gather_objects(written, layout.world_group)
            for name, digest in part.items()
        }
        if layout.rank == 0:
            write_run_state(temporary, state.model_copy(update={"files": files}))
            if final.exists():
                remove_tree(final)
            rename_durably(temporary, final)
            self._prune()
        dist.barrier(layout.world_group)
        return final

    def _prune(self) -> None:
        for path in self.finished()[: -self.keep_last]:
            remove_tree(path)


def collect_tensors(
    trained: Sequence[TrainedParameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters and optimiser states under canonical names, copies of tied weights left out."""
    tensors = {}
    for item in trained:
        if item.owned:
            tensors[f"parameter/{item.name}"] = item.parameter.detach().cpu().contiguous()
            for state in state_names(optimizer):
                value = optimizer.state[item.parameter][state]
                tensors[f"{state}/{item.name}"] = value.detach().cpu().contiguous()
    return tensors


def load_tensors(
    directory: Path, trained: Sequence[TrainedParameter], optimizer: torch.optim.Optimizer
) -> None:
    """Read this stage's parameters and optimiser states from whatever stage files hold them.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    files = [
        safe_open(path, framework="pt") for path in sorted(directory.glob("stage-*.safetensors"))
    ]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name not in where:
            raise CheckpointError(f"{directory}: no tensor {name}; it belongs to another run")
        tensor: Tensor = where[name].get_tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor

    for item in trained:
        parameter = item.parameter
        with torch.no_grad():
            parameter.copy_(read(f"parameter/{item.name}", parameter.shape))
        optimizer.state[parameter] = {
            name: read(
                f"{name}/{item.name}", torch.Size() if name == "step" else parameter.shape
            ).to(parameter.device)
            for name in state_names(optimizer)
        }


def newest(folder: CheckpointFolder, *, check_files: bool) -> tuple[Path, RunState] | None:
    """The newest checkpoint and its state; None if there is none.

    Raises:
        CheckpointError: the newest one is damaged. Nothing older is taken in silence.
    """
    finished = folder.finished()
    if not finished:
        return None
    return finished[-1], read_run_state(finished[-1], check_files=check_files)
