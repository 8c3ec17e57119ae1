"""What a step reports, where it is written, and how it reads on the console."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from headrace.schemas.publish import write_atomic

logger = logging.getLogger(__name__)

TRAIN_CURVES = (
    "loss",
    "router_loss",
    "lr",
    "gradient_norm",
    "tokens_per_second",
    "seconds",
    "memory_gib",
    "trained_share",
    "fill",
    "epoch",
)


@dataclass(frozen=True)
class RowLoss:
    """Summed loss of one row, in nats, over its trained tokens."""

    source: str
    loss: float
    trained_tokens: int


@dataclass(frozen=True)
class StepMetrics:
    """One training step. Losses in nats per trained token, times in seconds."""

    step: int
    epoch: float
    loss: float
    source_losses: dict[str, float]
    router_loss: float | None  # mixtures of experts: mean over layers, before its coefficient
    lr: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    trained_share: float
    memory_gib: float
    first_row: int
    rows_sha256: str
    fill: float
    source_tokens: dict[str, int]
    overlong_rows: int
    overlong_tokens: int


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation of one dataset, after `step` steps."""

    step: int
    name: str
    loss: float
    source_losses: dict[str, float]
    trained_tokens: int
    seconds: float


def mean_loss(rows: Iterable[RowLoss]) -> float:
    """Loss per trained token; added with one rounding, so the order of rows does not matter."""
    rows = list(rows)
    return math.fsum(row.loss for row in rows) / max(1, sum(row.trained_tokens for row in rows))


def losses_by_source(rows: Iterable[RowLoss]) -> dict[str, float]:
    """Loss per trained token of each source."""
    rows = list(rows)
    names = sorted({row.source for row in rows})
    return {name: mean_loss(row for row in rows if row.source == name) for name in names}


class MetricsLog:
    """`metrics.jsonl` (exact values, a line a step) and TensorBoard, in a run directory.

    Args:
        step: resume point; what an earlier process logged after it is taken back.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        kept = [line for line in self._lines() if is_kept(line, step)]
        write_atomic(self.path, "".join(kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def _lines(self) -> list[str]:
        """Whole lines of an earlier process; a last one that was cut off is dropped."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def write(self, metrics: StepMetrics | EvaluationMetrics) -> None:
        kind = "train" if isinstance(metrics, StepMetrics) else "evaluation"
        self.file.write(json.dumps({"kind": kind, **asdict(metrics)}) + "\n")
        self.file.flush()
        if isinstance(metrics, EvaluationMetrics):
            self._board(f"evaluation/{metrics.name}", {"loss": metrics.loss}, metrics.step)
            sources = metrics.source_losses
            self._board(f"evaluation/{metrics.name}/source_loss", sources, metrics.step)
            return
        curves = {name: getattr(metrics, name) for name in TRAIN_CURVES}
        self._board("train", curves, metrics.step)
        self._board("train/source_loss", metrics.source_losses, metrics.step)

    def _board(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is None:
                continue
            self.board.add_scalar(f"{prefix}/{name}", value, step)

    def sync(self) -> None:
        """Make what was written durable; before a checkpoint, so that it never knows more."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
        self.board.close()


def is_kept(line: str, step: int) -> bool:
    """Whether a line belongs to the first steps; one that a power cut has torn does not."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        logger.warning("metrics.jsonl: dropped a damaged line: %.40r", line)
        return False


def console_line(metrics: StepMetrics, total_steps: int, seconds_left: float) -> str:
    """One readable line for one step."""
    router = "" if metrics.router_loss is None else f"  router {metrics.router_loss:.4f}"
    return (
        f"step {metrics.step:>{len(str(total_steps))}}/{total_steps}"
        f"  {metrics.step / total_steps:4.0%}"
        f"  epoch {metrics.epoch:.2f}"
        f"  loss {metrics.loss:.4f}"
        f"  fill {metrics.fill:4.0%}"
        f"{router}"
        f"  lr {metrics.lr:.2e}"
        f"  grad {metrics.gradient_norm:.3f}"
        f"  {metrics.tokens_per_second:,.0f} tok/s"
        f"  {metrics.seconds:.2f} s/step"
        f"  left {duration(seconds_left)}"
    )


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
