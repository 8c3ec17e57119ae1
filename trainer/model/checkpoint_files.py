"""The tensors of a checkpoint, in whichever of its files they lie."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from headrace.schemas.errors import CheckpointError
from headrace.schemas.run_state import REMEDY, stage_files


def open_tensors(directory: Path) -> dict[str, Any]:
    """Return the open file that holds each tensor of a checkpoint, by the tensor's name.

    Raises:
        CheckpointError: a file cannot be read.
    """
    where: dict[str, Any] = {}
    for path in stage_files(directory):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); {REMEDY}") from None
        where |= dict.fromkeys(file.keys(), file)
    return where
