"""Destinations of metrics: a file of exact values, TensorBoard, and other reporters."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from headrace.schemas.publish import write_atomic
from headrace.trainer.run.histogram import Histogram
from headrace.trainer.run.metrics import EvaluationMetrics, StepMetrics
from headrace.trainer.run.reporters import Reporter

logger = logging.getLogger(__name__)

TRAIN_CURVES = (
    "loss",
    "cross_entropy",
    "router_loss",
    "lr",
    "gradient_norm",
    "tokens_per_second",
    "seconds",
    "data_seconds",
    "memory_gib",
    "tflops",
    "mfu",
    "product_norm_mean",
    "product_norm_max",
    "products_scaled",
    "trained_share",
    "fill",
    "epoch",
)
EVALUATION_CURVES = ("loss", "cross_entropy", "seconds")
PAIR_CURVES = ("accuracy", "margin", "chosen_reward", "rejected_reward")


class MetricsLog:
    """`metrics.jsonl` (exact values, a line a step) and TensorBoard, in a run directory.

    Args:
        step: resume point; what an earlier process logged after it is taken back.
        reporters: who gets the curves too.
    """

    def __init__(self, directory: Path, step: int, reporters: Sequence[Reporter] = ()) -> None:
        self.reporters = reporters
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
            curves = {name: getattr(metrics, name) for name in EVALUATION_CURVES}
            self._board(f"evaluation/{metrics.name}", curves, metrics.step)
            self._pairs(f"evaluation/{metrics.name}", metrics)
            sources = metrics.source_losses
            self._board(f"evaluation/{metrics.name}/source_loss", sources, metrics.step)
            self._tokens(f"evaluation/{metrics.name}", metrics)
            return
        curves = {name: getattr(metrics, name) for name in TRAIN_CURVES}
        self._board("train", curves, metrics.step)
        if metrics.product_norm_histogram is not None:
            norms = metrics.product_norm_histogram
            self._histogram("train/product_norm_histogram", norms, metrics.step)
        self._pairs("train", metrics)
        if metrics.answers is not None:
            self._board("train/answers", asdict(metrics.answers), metrics.step)
        self._board("train/source_loss", metrics.source_losses, metrics.step)
        self._tokens("train", metrics)

    def _pairs(self, prefix: str, metrics: StepMetrics | EvaluationMetrics) -> None:
        if metrics.pairs is not None:
            values = asdict(metrics.pairs)
            self._board(f"{prefix}/pairs", {k: values[k] for k in PAIR_CURVES}, metrics.step)

    def _tokens(self, prefix: str, metrics: StepMetrics | EvaluationMetrics) -> None:
        summary = metrics.token_summary
        if summary is None:
            return
        self._board(f"{prefix}/tokens", summary.curves(), metrics.step)
        self._board(f"{prefix}/loss_quantile", summary.loss_quantiles, metrics.step)
        self._board(f"{prefix}/entropy_quantile", summary.entropy_quantiles, metrics.step)
        for name, histogram in summary.histograms().items():
            self._histogram(f"{prefix}/tokens/{name}", histogram, metrics.step)

    def _board(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        known = {f"{prefix}/{name}": v for name, v in values.items() if v is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        for reporter in self.reporters:
            reporter.log(known, step)

    def _histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        self.board.add_histogram_raw(tag, **histogram.as_tensorboard(), global_step=step)

    def sync(self) -> None:
        """Make what was written durable; before a checkpoint, so that it never knows more."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
        self.board.close()
        for reporter in self.reporters:
            reporter.close()


def is_kept(line: str, step: int) -> bool:
    """Return whether a line belongs to the first steps; one that a power cut has torn does not."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        logger.warning("metrics.jsonl: dropped a damaged line: %.40r", line)
        return False
