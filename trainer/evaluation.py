"""Loss over whole evaluation sets: every row once, weighted by tokens."""

import time
from dataclasses import dataclass

from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.engine import StageEngine
from headrace.trainer.feed import Feed
from headrace.trainer.loader import GroupLoader
from headrace.trainer.metrics import EvaluationMetrics, losses_by_source, mean_loss
from headrace.trainer.position import Position


@dataclass(frozen=True)
class EvaluationSet:
    """One named set; only the first stage has a loader."""

    name: str
    batches: int
    feed: Feed
    loader: GroupLoader | None


def evaluate(
    sets: list[EvaluationSet], engine: StageEngine, layout: Layout, step: int
) -> list[EvaluationMetrics]:
    """Evaluate all sets after `step` training steps; every rank takes part and gets the results."""
    results = []
    for dataset in sets:
        start = time.perf_counter()
        if dataset.loader is not None:
            dataset.loader.seek(Position())
        mine = [
            row
            for _ in range(dataset.batches)
            for row in engine.evaluation_step(dataset.feed.next())
        ]
        rows = [row for part in gather_objects(mine, layout.world_group) for row in part]
        results.append(
            EvaluationMetrics(
                step=step,
                name=dataset.name,
                loss=mean_loss(rows),
                source_losses=losses_by_source(rows),
                trained_tokens=sum(row.trained_tokens for row in rows),
                seconds=time.perf_counter() - start,
            )
        )
    return results
