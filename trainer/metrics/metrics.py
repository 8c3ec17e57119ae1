"""Metrics of a step and of an evaluation, computed from the losses of rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.trainer.metrics.histogram import Histogram
from headrace.trainer.metrics.token_summary import TokenSummary
from headrace.trainer.objectives.row_loss import RowLoss


@dataclass(frozen=True)
class AnswerFacts:
    """Answers of one replica in one step."""

    answers: int
    tokens: int
    ended: int  # by a stop token, not by their limit
    seconds: float


@dataclass(frozen=True)
class PairMetrics:
    """Means over the pairs of a step or evaluation."""

    pairs: int
    accuracy: float  # share of pairs whose chosen answer has the higher reward
    margin: float  # chosen reward - rejected reward
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class LabelMetrics:
    """Means over the single answers of a step or evaluation."""

    answers: int
    desirable: int
    baseline: float  # what rewards are compared with
    chosen_reward: float | None  # of desirable answers, if there are any
    rejected_reward: float | None  # of the others
    margin: float | None  # between these two


@dataclass(frozen=True)
class AnswerMetrics:
    """Rejected answers that were generated before a step."""

    tokens: float  # of an answer on average
    ended: float  # share that a stop token ended, and not their limit
    seconds: float  # of the slowest replica


@dataclass(frozen=True)
class StepFacts:
    """Metrics of a step that every rank knows by itself. Times in seconds."""

    step: int
    epoch: float
    first_row: int
    lr: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    trained_share: float
    overlong_rows: int
    overlong_tokens: int
    seconds: float
    tokens_per_second: float
    tflops: float  # of each process, in products with weights; attention left out
    mfu: float | None  # that over what the GPU can do, where that is known


@dataclass(frozen=True)
class StepMetrics(StepFacts):
    """Metrics of one training step, of all ranks. Losses in nats per trained token or pair."""

    loss: float
    cross_entropy: float  # unadjusted, whatever is minimized; of pairs: of the chosen answers
    pairs: PairMetrics | None
    answers: AnswerMetrics | None
    source_losses: dict[str, float]
    router_loss: float | None  # mixtures of experts: mean over layers, before its coefficient
    memory_gib: float
    rows_sha256: str
    fill: float
    source_tokens: dict[str, int]
    data_seconds: float  # longest wait of a process for its part of the batch
    product_norm_mean: float | None  # of what adapters add, where that is measured
    product_norm_max: float | None
    products_scaled: int | None
    product_norm_histogram: Histogram | None = None
    token_summary: TokenSummary | None = None  # where it is wanted
    labels: LabelMetrics | None = None  # of single answers
    product_norm_min: float | None = None


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
    labels: LabelMetrics | None = None

    @property
    def weight(self) -> int:
        """Return the count that `loss` is a mean over: pairs, answers, or trained tokens."""
        if self.labels is not None:
            return self.labels.answers
        return self.trained_tokens if self.pairs is None else self.pairs.pairs


def mean_loss(rows: Iterable[RowLoss]) -> float:
    """Return the minimized loss, per trained token, pair or answer.

    It is added with one rounding, so the order of rows does not matter.
    """
    rows = list(rows)
    answers = [row.answer.loss for row in rows if row.answer is not None]
    if answers:
        return mean(answers)
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


def label_metrics(rows: Iterable[RowLoss]) -> LabelMetrics | None:
    """Rewards of single answers; None where rows are none."""
    answers = [row.answer for row in rows if row.answer is not None]
    if not answers:
        return None
    rewards = [
        [answer.reward for answer in answers if answer.desirable is label]
        for label in (True, False)
    ]
    chosen, rejected = (mean(values) if values else None for values in rewards)
    return LabelMetrics(
        answers=len(answers),
        desirable=len(rewards[0]),
        baseline=mean(answer.baseline for answer in answers),
        chosen_reward=chosen,
        rejected_reward=rejected,
        margin=None if chosen is None or rejected is None else chosen - rejected,
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
