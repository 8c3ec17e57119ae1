"""Loss over whole evaluation sets: every row once, weighted by tokens."""

import time
from dataclasses import dataclass
from typing import Protocol

from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.messages import gather, gather_at_first
from headrace.trainer.metrics.metrics import (
    EvaluationMetrics,
    label_metrics,
    losses_by_source,
    mean_cross_entropy,
    mean_loss,
    pair_metrics,
)
from headrace.trainer.metrics.step_losses import StepLosses
from headrace.trainer.metrics.token_summary import TokenSample, summarize
from headrace.trainer.objectives.row_loss import RowLoss
from headrace.trainer.order.position import Position
from headrace.trainer.parallel import RankLayout


class ForwardEngine(Protocol):
    """An engine that runs a forward pass alone."""

    def forward_only(self, inputs: StepInputs) -> StepLosses:
        """Return the losses of some micro-batches; every stage of the pipeline takes part."""


@dataclass(frozen=True)
class EvaluationSet:
    """One named set; only the first stage has a loader."""

    name: str
    batches: int
    feed: Feed
    loader: GroupLoader | None


def evaluate(
    sets: list[EvaluationSet], engine: ForwardEngine, layout: RankLayout, step: int
) -> list[EvaluationMetrics]:
    """Evaluate all sets after `step` training steps; every rank takes part and gets the results.

    The summary of tokens is the first rank's alone.
    """
    results = []
    for dataset in sets:
        start = time.perf_counter()
        if dataset.loader is not None:
            dataset.loader.seek(Position())
        mine: list[RowLoss] = []
        my_tokens: list[TokenSample | None] = []
        for _ in range(dataset.batches):
            losses = engine.forward_only(dataset.feed.next())
            mine += losses.rows
            my_tokens.append(losses.token_sample())
        rows = [row for part in gather(mine, layout.world_group) for row in part]
        samples = gather_at_first([s for s in my_tokens if s is not None], layout)
        results.append(
            EvaluationMetrics(
                step=step,
                name=dataset.name,
                loss=mean_loss(rows),
                source_losses=losses_by_source(rows),
                trained_tokens=sum(row.trained_tokens for row in rows),
                seconds=time.perf_counter() - start,
                cross_entropy=mean_cross_entropy(rows),
                pairs=pair_metrics(rows),
                labels=label_metrics(rows),
                token_summary=summarize([sample for part in samples for sample in part]),
            )
        )
    return results
