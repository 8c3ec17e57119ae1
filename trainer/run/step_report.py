"""Reports that ranks exchange after a step, and the metrics that follow from them."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer import devices
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.building.checkpoint_files import Written
from headrace.trainer.metrics.histogram import Histogram
from headrace.trainer.metrics.metrics import (
    AnswerFacts,
    AnswerMetrics,
    StepFacts,
    StepMetrics,
    label_metrics,
    losses_by_source,
    mean_cross_entropy,
    mean_loss,
    pair_metrics,
)
from headrace.trainer.metrics.token_summary import TokenSample, summarize
from headrace.trainer.objectives.row_loss import RowLoss
from headrace.trainer.optim.regularizers import ProductNorms
from headrace.trainer.shards.packed_rows import (
    PackedRow,
    fill,
    places_in_order,
    rows_digest,
    tokens_by_source,
)

GIB = 1 << 30
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}


@dataclass(frozen=True)
class Report:
    """One rank's part: losses from the last stages, rows from the first, wishes from anyone.

    `written` is its part of the pending checkpoint, once it is on disk; `quarantined` the row
    groups that its loader has given up.
    """

    losses: list[RowLoss]
    rows: list[list[list[PackedRow]]] | None
    router_loss: float | None
    memory_gib: float
    stop: bool
    save: bool
    written: Written | None
    quarantined: list[QuarantineRecord]
    data_seconds: float
    norms: ProductNorms | None
    tokens: TokenSample | None
    answers: AnswerFacts | None  # from the first stages


def memory_gib() -> float:
    """Peak memory of this process: of its GPU, or the resident set on CPU."""
    allocated = devices.peak_memory()
    if allocated is not None:
        return allocated / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_tflops() -> float | None:
    """Return the bfloat16 peak of this process's GPU by its data sheet; None if not listed."""
    name = devices.device_name()
    return next((rate for part, rate in PEAK_TFLOPS.items() if part in name), None)


def step_facts(
    inputs: StepInputs,
    *,
    step: int,
    epoch: float,
    first_row: int,
    lr: float,
    gradient_norm: float,
    seconds: float,
    flops_per_token: float,
) -> StepFacts:
    """Return the metrics of a step that need no other rank.

    Args:
        flops_per_token: forward and backward, of one process on average.
    """
    tflops, peak = flops_per_token * inputs.tokens / seconds / 1e12, peak_tflops()
    return StepFacts(
        step=step,
        epoch=epoch,
        first_row=first_row,
        lr=lr,
        gradient_norm=gradient_norm,
        tokens=inputs.tokens,
        trained_tokens=inputs.trained_tokens,
        trained_share=inputs.trained_tokens / max(1, inputs.tokens),
        overlong_rows=inputs.overlong.rows,
        overlong_tokens=inputs.overlong.tokens,
        seconds=seconds,
        tokens_per_second=inputs.tokens / seconds,
        tflops=tflops,
        mfu=None if peak is None else tflops / peak,
    )


def step_metrics(reports: Sequence[Report], facts: StepFacts, capacity: int) -> StepMetrics:
    """Return the whole job's metrics of one step.

    Args:
        capacity: tokens of all sequences of a row.
    """
    losses = [row for report in reports for row in report.losses]
    places = batch_places(reports)
    rows = list(chain.from_iterable(places))
    router_losses = [r.router_loss for r in reports if r.router_loss is not None]
    limited = [r.norms for r in reports if r.norms is not None]
    norms = [norm for part in limited for norm in part.norms]
    scaled = [part.scaled for part in limited if part.scaled is not None]
    return StepMetrics(
        **vars(facts),
        loss=mean_loss(losses),
        cross_entropy=mean_cross_entropy(losses),
        pairs=pair_metrics(losses),
        labels=label_metrics(losses),
        answers=answer_metrics([r.answers for r in reports if r.answers is not None]),
        source_losses=losses_by_source(losses),
        router_loss=math.fsum(router_losses) if router_losses else None,
        memory_gib=max(report.memory_gib for report in reports),
        rows_sha256=rows_digest(rows),
        fill=fill(facts.tokens, len(places), capacity),
        source_tokens=tokens_by_source(rows),
        data_seconds=max(report.data_seconds for report in reports),
        product_norm_mean=math.fsum(norms) / len(norms) if norms else None,
        product_norm_min=min(norms) if norms else None,
        product_norm_max=max(norms) if norms else None,
        products_scaled=sum(scaled) if scaled else None,
        product_norm_histogram=Histogram.of(norms) if norms else None,
        token_summary=summarize([r.tokens for r in reports if r.tokens is not None]),
    )


def batch_places(reports: Sequence[Report]) -> list[Sequence[PackedRow]]:
    """Return the sequences of the global batch that hold rows, in its order."""
    return places_in_order([report.rows for report in reports if report.rows is not None])


def answer_metrics(facts: Sequence[AnswerFacts]) -> AnswerMetrics | None:
    """Average over the answers that all replicas generated; None where shards have them."""
    if not facts:
        return None
    count = max(1, sum(part.answers for part in facts))
    return AnswerMetrics(
        tokens=sum(part.tokens for part in facts) / count,
        ended=sum(part.ended for part in facts) / count,
        seconds=max(part.seconds for part in facts),
    )
