"""Files that a run leaves: `run_state.json` in a checkpoint, where training and loader stand, with
the files beside it; metrics in the run directory.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace.schemas.errors import CheckpointError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.publish import write_atomic

RUN_STATE_NAME = "run_state.json"
RUN_CONFIG_NAME = "train.json"  # the resolved config, in a run directory
METRICS_NAME = "metrics.jsonl"  # a line for each step and evaluation, there as well
RUN_STATE_VERSION = 1
REMEDY = "remove this checkpoint to resume from an older one"


class QuarantineRecord(BaseModel):
    """A row group that is damaged, and the one that is read in its place.

    `first_row` and `rows` are its rows in `file`, a path or URL.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    row_group: int
    first_row: int
    rows: int
    problem: str
    substitute_file: str
    substitute_row_group: int


class DatasetRecord(BaseModel):
    """A dataset in a run: its settings, and its own rows that came before the segment began.

    `number` derives the seed of its own order when it is interleaved; no two of a run share one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    fingerprint: str  # SHA-256 of the manifest
    weight: float
    repeats: int
    max_tokens: int | None
    number: int
    seen: int = 0


class DataSegment(BaseModel):
    """A stretch of a run's rows that comes from one mixture: from global row `first_row` on.

    `epoch` is the number of epochs before it, a whole one where datasets are concatenated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_row: int
    epoch: float
    mixing: Literal["concatenate", "interleave"]
    mixing_unit: Literal["tokens", "rows"]
    mixing_stop: Literal["first_exhausted", "all_exhausted"]
    datasets: list[DatasetRecord]


class RunState(BaseModel):
    """State that a run resumes from, beside the tensors.

    Row order, initial adapter and dropout are pure functions of the seed and the position, so
    `seed`, `step`, `next_row` and `waiting` are the whole random state.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["headrace-checkpoint"] = "headrace-checkpoint"
    format_version: int = RUN_STATE_VERSION
    step: int
    next_row: int
    data: list[DataSegment] = []  # more than one after a change of the datasets
    waiting: list[int] = []  # rows before it that a packing loader has still to place
    seed: int
    tokens: int
    seconds: float
    overlong_rows: int = 0
    overlong_tokens: int = 0
    global_batch_rows: int
    stages: int
    replicas: int
    sequence_ranks: int = 1
    tensor_ranks: int = 1
    config_fingerprint: str
    data_fingerprint: str
    files: dict[str, str]  # name -> SHA-256
    loss: float | None = None  # of the last step
    recent_losses: list[float] = []  # of the steps before, for telling a spike; newest last
    evaluation_loss: float | None = None  # of the last evaluation, over all sets
    best_loss: float | None = None  # the lowest evaluation loss
    best_step: int | None = None  # and the step after which it was found
    evaluations_since_best: int = 0
    weights_only: bool = False  # the optimizer's states are not in the files
    quarantined: list[QuarantineRecord] = []
    loss_scale: float | None = None  # of the next step, in float16
    loss_scale_steps: int = 0  # taken with it, or since it was last doubled

    @property
    def rows_done(self) -> int:
        """Rows that were in batches, or dropped."""
        return self.next_row - len(self.waiting)

    def after_step(
        self,
        *,
        next_row: int,
        waiting: Sequence[int],
        tokens: int,
        seconds: float,
        overlong_rows: int,
        overlong_tokens: int,
    ) -> "RunState":
        """One step on.

        Args:
            next_row, waiting: where the next step begins.
            tokens, seconds, overlong_rows, overlong_tokens: of this step.
        """
        return self.model_copy(
            update={
                "step": self.step + 1,
                "next_row": next_row,
                "waiting": list(waiting),
                "tokens": self.tokens + tokens,
                "seconds": self.seconds + seconds,
                "overlong_rows": self.overlong_rows + overlong_rows,
                "overlong_tokens": self.overlong_tokens + overlong_tokens,
            }
        )

    def with_loss_scale(self, factor: float, steps: int) -> "RunState":
        """The same moment, with the scale of the next step's loss."""
        return self.model_copy(update={"loss_scale": factor, "loss_scale_steps": steps})

    def after_losses(self, losses: Sequence[float], kept: int) -> "RunState":
        """The same moment, with the losses of the last steps known; so many are remembered."""
        recent = [*self.recent_losses, *losses][-kept:] if kept else []
        return self.model_copy(update={"loss": losses[-1], "recent_losses": recent})

    def after_evaluation(self, loss: float) -> "RunState":
        """The same moment, with what an evaluation found; a loss that is not a number never wins.

        What is found before the first step is no candidate: there is nothing trained to keep.
        """
        if self.step == 0:
            return self.model_copy(update={"evaluation_loss": loss})
        won = loss < (math.inf if self.best_loss is None else self.best_loss)
        best = {"best_loss": loss, "best_step": self.step} if won else {}
        since = 0 if won else self.evaluations_since_best + 1
        update = {"evaluation_loss": loss, "evaluations_since_best": since, **best}
        return self.model_copy(update=update)


def write_run_state(directory: Path, state: RunState) -> None:
    """Write the state of a checkpoint that is complete otherwise."""
    body = state.model_dump(mode="json")
    body["sha256"] = fingerprint(body)
    write_atomic(directory / RUN_STATE_NAME, json.dumps(body, indent=1) + "\n")


def read_run_state(directory: Path, *, check_files: bool = True) -> RunState:
    """Read and check a checkpoint's state and, unless told otherwise, the hashes of its files.

    Raises:
        CheckpointError: damaged, incomplete, or of another version.
    """
    path = directory / RUN_STATE_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("sha256", None)
        version = body.get("format_version")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove this checkpoint") from None
    if version != RUN_STATE_VERSION:
        raise CheckpointError(f"{path}: version {version}, this release reads {RUN_STATE_VERSION}")
    if checksum != fingerprint(body):
        raise CheckpointError(f"{path}: edited or damaged; remove this checkpoint")
    try:
        state = RunState.model_validate(body)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {error.errors()[0]['msg']}; remove this checkpoint"
        ) from None
    for name in state.files:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: lists {name}, outside of it; remove this checkpoint")
    if check_files:
        check_listed_files(directory, state)
    return state


def check_listed_files(directory: Path, state: RunState) -> None:
    """Check that a checkpoint holds the files that its state lists, as they were written.

    Raises:
        CheckpointError: one is missing or damaged, or another one lies beside them.
    """
    for name, expected in state.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {REMEDY}")
        if file_sha256(file) != expected:
            raise CheckpointError(f"{file}: damaged; {REMEDY}")
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in state.files:
            raise CheckpointError(
                f"{file}: {RUN_STATE_NAME} does not list it, so it is of another run; remove it"
            )


def stage_files(directory: Path) -> list[Path]:
    """Return the files that a checkpoint's state lists; others beside them are never read.

    Raises:
        CheckpointError: the state cannot be read.
    """
    return [directory / name for name in read_run_state(directory, check_files=False).files]


class Metrics(NamedTuple):
    """The lines of a run's metrics, and how many could not be read."""

    lines: list[dict[str, Any]]
    damaged: int


def read_metrics(run_directory: Path) -> Metrics:
    """Read what a run has logged so far; a last line that is still being written is left out."""
    path = run_directory / METRICS_NAME
    content = path.read_bytes() if path.is_file() else b""
    whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    read = [parse_metrics(line) for line in whole]
    return Metrics([line for line in read if line is not None], read.count(None))


def parse_metrics(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line; None of one that is no line of metrics."""
    try:
        value: dict[str, Any] = json.loads(line)
        if value["kind"] in {"train", "evaluation"} and isinstance(value["step"], int):
            float(value["loss"])
            return value
    except (ValueError, TypeError, KeyError):
        pass
    return None
