"""What the ranks tell each other after a step, and the metrics that follow from it."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from headrace.schemas.run_state import QuarantineRecord
from headrace.trainer.data.feed import StepInputs
from headrace.trainer.data.placed_rows import (
    PlacedRow,
    fill,
    places_in_order,
    rows_digest,
    tokens_by_source,
)
from headrace.trainer.run.metrics import (
    RowLoss,
    StepMetrics,
    losses_by_source,
    mean_cross_entropy,
    mean_loss,
    pair_metrics,
)
from headrace.trainer.run.saver import Written

GIB = 1 << 30


@dataclass(frozen=True)
class Report:
    """One rank's part: losses from the last stages, rows from the first, wishes from anyone.

    `written` is its part of the pending checkpoint, once it is on disk; `quarantined` the row
    groups that its loader has given up.
    """

    losses: list[RowLoss]
    rows: list[list[list[PlacedRow]]] | None
    router_loss: float | None
    memory_gib: float
    stop: bool
    save: bool
    written: Written | None
    quarantined: list[QuarantineRecord]


@dataclass(frozen=True)
class StepFacts:
    """What every rank knows of a step by itself."""

    step: int
    first_row: int
    epoch: float
    room: int  # tokens of all places of a row
    lr: float
    gradient_norm: float
    seconds: float


def make_report(
    losses: list[RowLoss],
    inputs: StepInputs,
    router_loss: float | None,
    stop: bool,
    save: bool,
    written: Written | None,
    quarantined: list[QuarantineRecord],
) -> Report:
    """This rank's report."""
    return Report(
        losses,
        inputs.leader_rows,
        router_loss,
        memory_gib(),
        stop,
        save,
        written,
        quarantined,
    )


def memory_gib() -> float:
    """Peak memory of this process: of its GPU, or the resident set on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def step_metrics(reports: Sequence[Report], inputs: StepInputs, facts: StepFacts) -> StepMetrics:
    """The whole job's metrics of one step."""
    losses = [row for report in reports for row in report.losses]
    places = places_in_order([report.rows for report in reports if report.rows is not None])
    rows = list(chain.from_iterable(places))
    router_losses = [r.router_loss for r in reports if r.router_loss is not None]
    return StepMetrics(
        step=facts.step,
        epoch=facts.epoch,
        loss=mean_loss(losses),
        cross_entropy=mean_cross_entropy(losses),
        pairs=pair_metrics(losses),
        source_losses=losses_by_source(losses),
        router_loss=math.fsum(router_losses) if router_losses else None,
        lr=facts.lr,
        gradient_norm=facts.gradient_norm,
        tokens=inputs.tokens,
        trained_tokens=inputs.trained_tokens,
        seconds=facts.seconds,
        tokens_per_second=inputs.tokens / facts.seconds,
        trained_share=inputs.trained_tokens / max(1, inputs.tokens),
        memory_gib=max(report.memory_gib for report in reports),
        first_row=facts.first_row,
        rows_sha256=rows_digest(rows),
        fill=fill(inputs.tokens, len(places), facts.room),
        source_tokens=tokens_by_source(rows),
        overlong_rows=inputs.overlong.rows,
        overlong_tokens=inputs.overlong.tokens,
    )
