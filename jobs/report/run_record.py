"""A run, as its directory has it: config, metrics, checkpoints."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.schemas.checkpoint_names import CHECKPOINTS_FOLDER, published_checkpoints
from headrace.schemas.errors import DataError
from headrace.schemas.train.run_state import RUN_CONFIG_NAME, read_metrics

ANSWERS_NAME = "answers.jsonl"
TEXTS = ("prompt", "answer")
Line = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation set's lines, in the order of steps."""

    name: str
    lines: list[Line]

    @property
    def first(self) -> float:
        """Return the loss of the first evaluation."""
        return float(self.lines[0]["loss"])

    @property
    def last(self) -> float:
        """Return the loss of the newest evaluation."""
        return float(self.lines[-1]["loss"])

    @property
    def lowest(self) -> Line:
        """Return the line of the lowest loss; the first line where none is finite."""
        finite = [line for line in self.lines if math.isfinite(line["loss"])]
        return min(finite or self.lines, key=lambda line: float(line["loss"]))

    @property
    def change(self) -> float:
        """Return the change of the loss since the first evaluation, as a share of it."""
        return self.last / self.first - 1 if self.first else math.nan


@dataclass(frozen=True)
class RunRecord:
    """A run, as its files have it at one moment.

    `damaged` counts the lines of the metrics that could not be read.
    """

    directory: Path
    config: Line
    written: Line  # what train.json holds beside the config
    steps: list[Line]
    evaluations: list[Evaluation]
    checkpoints: list[str]
    damaged: int
    answers: list[Line]

    @property
    def not_finite(self) -> list[int]:
        """Return the steps whose loss is NaN or infinite."""
        return [line["step"] for line in self.steps if not math.isfinite(line["loss"])]


def read_run(directory: Path) -> RunRecord:
    """Read a run that has ended, or that still trains.

    Raises:
        DataError: the directory holds no run.
    """
    path = directory / RUN_CONFIG_NAME
    if not path.is_file():
        raise DataError(f"{path}: not found; give the output_dir of a run that has begun")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = record.pop("config")
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name another run") from error
    lines, damaged = read_metrics(directory)
    return RunRecord(
        directory,
        config,
        record,
        [line for line in lines if line["kind"] == "train"],
        list(by_name(line for line in lines if line["kind"] == "evaluation")),
        [found.name for found in published_checkpoints(directory / CHECKPOINTS_FOLDER)],
        damaged,
        list(read_answers(directory / ANSWERS_NAME)),
    )


def read_answers(path: Path) -> Iterator[Line]:
    """Yield the answers of the newest evaluation that was answered; damaged lines are left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    found = [line for line in map(parse_answer, lines) if line is not None]
    newest = max((line["step"] for line in found), default=0)
    yield from (line for line in found if line["step"] == newest)


def parse_answer(line: bytes) -> Line | None:
    """Return the values of a line; None of one that is cut off, or no answer."""
    try:
        value = json.loads(line)
        known = isinstance(value["step"], int) and all(isinstance(value[key], str) for key in TEXTS)
        return value if known else None
    except (ValueError, TypeError, KeyError):
        return None


def by_name(lines: Iterable[Line]) -> Iterator[Evaluation]:
    """Yield the evaluations of each set."""
    sets: dict[str, list[Line]] = {}
    for line in lines:
        sets.setdefault(line["name"], []).append(line)
    for name, found in sets.items():
        yield Evaluation(name, found)
