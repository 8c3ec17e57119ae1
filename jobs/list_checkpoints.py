"""A run's checkpoints as a table: where each stands, how good it is, whether it is sound."""

import datetime
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from headrace.schemas.errors import CheckpointError
from headrace.schemas.run_state import (
    CHECKPOINTS_FOLDER,
    RunState,
    published_checkpoints,
    read_run_state,
)

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
    for path in paths:
        size = decimal(sum(file.stat().st_size for file in path.iterdir()))
        seconds = int(path.stat().st_mtime)
        written = datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
        try:
            state = read_run_state(path)
            table.add_row(path.name, *describe(state), size, written, "sound")
        except CheckpointError as error:
            problems.append(str(error))
            table.add_row(path.name, "", "", "", size, written, "damaged")
    console = console or Console()
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True)
    return not problems


def describe(state: RunState) -> tuple[str, str, str]:
    """Tokens, training loss and evaluation loss; the lowest one up to then is marked."""
    best = " (lowest)" if state.best_step == state.step else ""
    evaluation = "" if state.evaluation_loss is None else f"{state.evaluation_loss:.4f}{best}"
    return f"{state.tokens:,}", "" if state.loss is None else f"{state.loss:.4f}", evaluation
