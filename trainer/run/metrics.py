"""What a step reports, where it is written, and how it reads on the console."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from headrace.schemas.publish import write_atomic
from headrace.trainer.run.reporters import Reporter
from headrace.trainer.run.token_summary import TokenSummary

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
PAIR_CURVES = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class PairLoss:
    """A pair's loss, and how much more likely than to the reference its answers are, times beta."""

    loss: float
    chosen_reward: float
    rejected_reward: float
    chosen_weight: float  # of the chosen answers' cross-entropy beside the loss of pairs


@dataclass(frozen=True)
class RowLoss:
    """Summed loss of one row, in nats, over its trained tokens.

    `unadjusted` is its cross-entropy where something else is minimised. Of a pair, `loss` is the
    cross-entropy of the chosen answer, and what is minimised stands in `pair`.
    """

    source: str
    loss: float
    trained_tokens: int
    unadjusted: float | None = None
    pair: PairLoss | None = None

    @property
    def cross_entropy(self) -> float:
        """In nats, over the trained tokens."""
        return self.loss if self.unadjusted is None else self.unadjusted


@dataclass(frozen=True)
class PairMetrics:
    """Means over the pairs of a step or evaluation."""

    pairs: int
    accuracy: float  # share of pairs whose chosen answer has the higher reward
    margin: float  # chosen reward - rejected reward
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class AnswerMetrics:
    """Rejected answers that were generated before a step."""

    tokens: float  # of an answer on average
    ended: float  # share that a stop token ended, and not their limit
    seconds: float  # of the slowest replica


@dataclass(frozen=True)
class StepMetrics:
    """One training step. Losses in nats per trained token or pair, times in seconds."""

    step: int
    epoch: float
    loss: float
    cross_entropy: float  # unadjusted, whatever is minimised; of pairs: of the chosen answers
    pairs: PairMetrics | None
    answers: AnswerMetrics | None
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
    data_seconds: float  # longest wait of a process for its part of the batch
    tflops: float  # of each process, in products with weights; attention left out
    mfu: float | None  # that over what the GPU can do, where that is known
    product_norm_mean: float | None  # of what adapters add, where that is limited
    product_norm_max: float | None
    products_scaled: int | None
    token_summary: TokenSummary | None = None  # where it is wanted


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation of one dataset, after `step` steps."""

    step: int
    name: str
    loss: float
    source_losses: dict[str, float]
    trained_tokens: int
    seconds: float
    cross_entropy: float
    pairs: PairMetrics | None
    token_summary: TokenSummary | None = None  # at the first rank

    @property
    def weight(self) -> int:
        """What `loss` is a mean over: pairs, or trained tokens."""
        return self.trained_tokens if self.pairs is None else self.pairs.pairs


def mean_loss(rows: Iterable[RowLoss]) -> float:
    """What is minimised, per trained token or pair; added with one rounding, so the order of rows
    does not matter.
    """
    rows = list(rows)
    pairs = [row.pair for row in rows if row.pair is not None]
    if pairs:
        beside = pairs[0].chosen_weight * mean_cross_entropy(rows)
        return mean(pair.loss for pair in pairs) + beside
    return math.fsum(row.loss for row in rows) / max(1, sum(row.trained_tokens for row in rows))


def mean_cross_entropy(rows: Iterable[RowLoss]) -> float:
    """Unadjusted cross-entropy per trained token."""
    rows = list(rows)
    tokens = sum(row.trained_tokens for row in rows)
    return math.fsum(row.cross_entropy for row in rows) / max(1, tokens)


def pair_metrics(rows: Iterable[RowLoss]) -> PairMetrics | None:
    """Rewards of pairs; None where rows are not pairs."""
    pairs = [row.pair for row in rows if row.pair is not None]
    if not pairs:
        return None
    return PairMetrics(
        pairs=len(pairs),
        accuracy=mean(pair.chosen_reward > pair.rejected_reward for pair in pairs),
        margin=mean(pair.chosen_reward - pair.rejected_reward for pair in pairs),
        chosen_reward=mean(pair.chosen_reward for pair in pairs),
        rejected_reward=mean(pair.rejected_reward for pair in pairs),
    )


def mean(values: Iterable[float]) -> float:
    """Added with one rounding."""
    values = list(values)
    return math.fsum(values) / len(values)


def losses_by_source(rows: Iterable[RowLoss]) -> dict[str, float]:
    """Loss per trained token of each source."""
    rows = list(rows)
    names = sorted({row.source for row in rows})
    return {name: mean_loss(row for row in rows if row.source == name) for name in names}


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
            losses = {"loss": metrics.loss, "cross_entropy": metrics.cross_entropy}
            self._board(f"evaluation/{metrics.name}", losses, metrics.step)
            self._pairs(f"evaluation/{metrics.name}", metrics)
            sources = metrics.source_losses
            self._board(f"evaluation/{metrics.name}/source_loss", sources, metrics.step)
            self._tokens(f"evaluation/{metrics.name}", metrics)
            return
        curves = {name: getattr(metrics, name) for name in TRAIN_CURVES}
        self._board("train", curves, metrics.step)
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
            self.board.add_histogram_raw(
                f"{prefix}/tokens/{name}", **histogram.as_tensorboard(), global_step=metrics.step
            )

    def _board(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        known = {f"{prefix}/{name}": v for name, v in values.items() if v is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        for reporter in self.reporters:
            reporter.log(known, step)

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
    """Whether a line belongs to the first steps; one that a power cut has torn does not."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        logger.warning("metrics.jsonl: dropped a damaged line: %.40r", line)
        return False


def console_line(metrics: StepMetrics, total_steps: int, seconds_left: float) -> str:
    """One readable line for one step."""
    plain = "" if metrics.cross_entropy == metrics.loss else f"  ce {metrics.cross_entropy:.4f}"
    if metrics.pairs is not None:
        plain += f"  accuracy {metrics.pairs.accuracy:4.0%}  margin {metrics.pairs.margin:.3f}"
    if metrics.answers is not None:
        answers = metrics.answers
        plain += f"  answers {answers.tokens:.0f} tok, {answers.ended:4.0%} ended"
        plain += f", {answers.seconds:.1f} s"
    router = "" if metrics.router_loss is None else f"  router {metrics.router_loss:.4f}"
    return (
        f"step {metrics.step:>{len(str(total_steps))}}/{total_steps}"
        f"  {metrics.step / total_steps:4.0%}"
        f"  epoch {metrics.epoch:.2f}"
        f"  loss {metrics.loss:.4f}{plain}"
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
