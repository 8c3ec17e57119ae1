"""Names of a run's checkpoints, and of the folder that they lie in."""

import re
from pathlib import Path

CHECKPOINTS_FOLDER = "checkpoints"


CHECKPOINT_NAME = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"step-{step:06d}"


def published_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints`, by step. Half-written ones have other names."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]
