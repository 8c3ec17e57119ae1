"""A run's checkpoints as a table: where each stands, how good it is, whether it is sound."""

import datetime
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from headrace.schemas.checkpoint_names import CHECKPOINTS_FOLDER, published_checkpoints
from headrace.schemas.errors import CheckpointError
from headrace.schemas.train.run_state import RunState, read_run_state

COLUMNS = ("checkpoint", "tokens", "loss", "evaluation loss", "size", "written", "state")


def list_checkpoints(run: Path, console: Console | None = None) -> bool:
    """Print the table, newest last; every file is hashed. Returns whether all are sound.

    Raises:
        CheckpointError: there is no checkpoint in the directory.
    """
    paths = published_checkpoints(run / CHECKPOINTS_FOLDER)
    if not paths:
        raise CheckpointError(f"{run / CHECKPOINTS_FOLDER}: no checkpoints; name a run directory")
    table = Table(*COLUMNS, box=None)
    for column in table.columns[1:5]:
        column.justify = "right"
    problems = []
    best = best_step(paths)
    for path in paths:
        size = decimal(sum(file.stat().st_size for file in path.iterdir()))
        seconds = int(path.stat().st_mtime)
        written = datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
        try:
            state = read_run_state(path)
            table.add_row(path.name, *describe(state, best), size, written, soundness(state))
        except CheckpointError as error:
            problems.append(str(error))
            table.add_row(path.name, "", "", "", size, written, "damaged")
    console = console or Console(markup=False, emoji=False)
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True)
    return not problems


def soundness(state: RunState) -> str:
    """Describe a checkpoint whose files are as they were written."""
    return "sound, weights only" if state.weights_only else "sound"


def best_step(paths: Sequence[Path]) -> int | None:
    """The step of the lowest evaluation loss, by the newest checkpoint that can be read."""
    for path in reversed(paths):
        with suppress(CheckpointError):
            return read_run_state(path, check_files=False).best_step
    return None


def describe(state: RunState, best: int | None) -> tuple[str, str, str]:
    """Tokens, training loss and evaluation loss; the run's lowest one is marked."""
    mark = " (lowest)" if best == state.step else ""
    evaluation = "" if state.evaluation_loss is None else f"{state.evaluation_loss:.4f}{mark}"
    return f"{state.tokens:,}", "" if state.loss is None else f"{state.loss:.4f}", evaluation
