"""What the ranks tell each other after a step, and the metrics that follow from it."""

import hashlib
import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.trainer.feed import StepInputs
from headrace.trainer.metrics import RowLoss, StepMetrics, losses_by_source, mean_loss
from headrace.trainer.saver import Written

GIB = 1 << 30


@dataclass(frozen=True)
class Report:
    """One rank's part: losses from the last stages, row keys from the first, wishes from anyone.

    `written` is its part of the pending checkpoint, once it is on disk.
    """

    losses: list[RowLoss]
    row_keys: list[list[int | None]] | None
    memory_gib: float
    stop: bool
    save: bool
    written: Written | None


@dataclass(frozen=True)
class StepFacts:
    """What every rank knows of a step by itself."""

    step: int
    first_row: int
    rows_per_epoch: int
    next_row: int
    lr: float
    gradient_norm: float
    seconds: float


def make_report(
    losses: list[RowLoss], inputs: StepInputs, stop: bool, save: bool, written: Written | None
) -> Report:
    """This rank's report."""
    return Report(losses, inputs.row_keys, memory_gib(), stop, save, written)


def memory_gib() -> float:
    """Peak memory of this process: of its GPU, or the resident set on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def step_metrics(reports: Sequence[Report], inputs: StepInputs, facts: StepFacts) -> StepMetrics:
    """The whole job's metrics of one step."""
    losses = [row for report in reports for row in report.losses]
    return StepMetrics(
        step=facts.step,
        epoch=facts.next_row / facts.rows_per_epoch,
        loss=mean_loss(losses),
        source_losses=losses_by_source(losses),
        lr=facts.lr,
        gradient_norm=facts.gradient_norm,
        tokens=inputs.tokens,
        trained_tokens=inputs.trained_tokens,
        seconds=facts.seconds,
        tokens_per_second=inputs.tokens / facts.seconds,
        trained_share=inputs.trained_tokens / max(1, inputs.tokens),
        memory_gib=max(report.memory_gib for report in reports),
        first_row=facts.first_row,
        rows_sha256=rows_digest(
            [report.row_keys for report in reports if report.row_keys is not None]
        ),
    )


def rows_digest(leaders: Sequence[list[list[int | None]]]) -> str:
    """SHA-256 over the row keys of a global batch, in its order.

    Args:
        leaders: [replica][micro-batch][row] keys.
    """
    digest = hashlib.sha256()
    for micro_batches in zip(*leaders, strict=True):
        for keys in micro_batches:
            for key in keys:
                if key is not None:
                    digest.update(key.to_bytes(8, "little"))
    return digest.hexdigest()
