"""Destinations of metrics: a file of exact values, TensorBoard, and other reporters."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from headrace.schemas.publish import write_atomic, writing
from headrace.schemas.train.run_state import METRICS_NAME, read_metrics
from headrace.trainer.metrics.answers_log import AnswersLog, PromptedAnswer, as_markdown
from headrace.trainer.metrics.histogram import Histogram
from headrace.trainer.metrics.loss_changes import LossChanges
from headrace.trainer.metrics.metrics import EvaluationMetrics, StepMetrics
from headrace.trainer.metrics.reporters import Reporter

logger = logging.getLogger(__name__)

REMEDY = "make room, or make it writable, then --resume"

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
    "product_norm_min",
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
        self.path = directory / METRICS_NAME
        with writing(self.path, REMEDY):
            write_atomic(self.path, "".join(kept_lines(self.path, step)))
            self.file = self.path.open("a", encoding="utf-8")
        self.answers = AnswersLog(directory, step, REMEDY)
        self.changes = LossChanges()
        for line in read_metrics(directory).lines:
            if line["kind"] == "evaluation":
                self.changes.note(line["name"], line["loss"])
        self.board_directory = directory / "tensorboard"
        with writing(self.board_directory, REMEDY):
            self.board = SummaryWriter(str(self.board_directory), purge_step=step + 1)

    def write(self, metrics: StepMetrics | EvaluationMetrics) -> None:
        kind = "train" if isinstance(metrics, StepMetrics) else "evaluation"
        with writing(self.path, REMEDY):
            self.file.write(json.dumps({"kind": kind, **asdict(metrics)}) + "\n")
            self.file.flush()
        with writing(self.board_directory, REMEDY):
            self._draw(metrics)

    def write_answers(self, step: int, answers: Sequence[PromptedAnswer]) -> None:
        """Write what an evaluation was answered."""
        self.answers.write(step, answers)
        with writing(self.board_directory, REMEDY):
            self.board.add_text("evaluation/answers", as_markdown(answers), step)
        for reporter in self.reporters:
            reporter.log_answers(answers, step)

    def _draw(self, metrics: StepMetrics | EvaluationMetrics) -> None:
        if isinstance(metrics, EvaluationMetrics):
            curves = {name: getattr(metrics, name) for name in EVALUATION_CURVES}
            curves |= self.changes.note(metrics.name, metrics.loss)
            self._board(f"evaluation/{metrics.name}", curves, metrics.step)
            self._pairs(f"evaluation/{metrics.name}", metrics)
            self._labels(f"evaluation/{metrics.name}", metrics)
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
        self._labels("train", metrics)
        if metrics.answers is not None:
            self._board("train/answers", asdict(metrics.answers), metrics.step)
        self._board("train/source_loss", metrics.source_losses, metrics.step)
        self._tokens("train", metrics)

    def _pairs(self, prefix: str, metrics: StepMetrics | EvaluationMetrics) -> None:
        if metrics.pairs is not None:
            values = asdict(metrics.pairs)
            self._board(f"{prefix}/pairs", {k: values[k] for k in PAIR_CURVES}, metrics.step)

    def _labels(self, prefix: str, metrics: StepMetrics | EvaluationMetrics) -> None:
        if metrics.labels is not None:
            self._board(f"{prefix}/labels", asdict(metrics.labels), metrics.step)

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
        with writing(self.path, REMEDY):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
        with writing(self.board_directory, REMEDY):
            self.board.close()
        for reporter in self.reporters:
            reporter.close()


def kept_lines(path: Path, step: int) -> list[str]:
    """Return what an earlier process logged of the first steps; what is lost of them is named.

    A last line that was cut off is dropped, and so are those that are damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    logged = [(line, read_line(path, line)) for line in lines]
    kept = [(line, entry) for line, entry in logged if entry is not None and entry["step"] <= step]
    found = {entry["step"] for _, entry in kept if entry.get("kind") == "train"}
    lost = [number for number in range(1, step + 1) if number not in found]
    if lost:
        logger.warning(
            "%s: the lines of %d of %d steps are lost (the first is of step %d); "
            "what is trained does not depend on them",
            path,
            len(lost),
            step,
            lost[0],
        )
    return [line.decode() for line, _ in kept]


def read_line(path: Path, line: bytes) -> dict[str, Any] | None:
    """Return a line's values; None, said once, of one that a power cut or an edit has damaged."""
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            return entry
    except ValueError:
        pass
    logger.warning("%s: dropped a damaged line: %.40r", path, line)
    return None
