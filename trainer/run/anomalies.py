"""Steps that go wrong: gradients that are not finite, losses that jump; what is done about them."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from headrace.schemas.errors import TrainingError
from headrace.schemas.train.run_config import AnomalyConfig
from headrace.schemas.train.run_state import RunState
from headrace.trainer.metrics.outcome import Anomaly
from headrace.trainer.shards.packed_rows import PackedRow

logger = logging.getLogger(__name__)

ANOMALIES_NAME = "anomalies.jsonl"
SHOWN_ROWS = 3

NOTHING_TRAINED = Anomaly("no trained token is in it", "skip")


def overflow(scale: float) -> Anomaly:
    """Return the anomaly of a step whose gradients do not fit float16 at this scale."""
    what = f"gradients overflow float16 with a loss scaled by {scale:,.0f}, which is halved"
    return Anomaly(what, "skip")


def judge(
    config: AnomalyConfig, norm: float, loss: float | None, recent_losses: Sequence[float]
) -> Anomaly | None:
    """Return the anomaly of a step, if there is one; the same answer at every rank.

    Args:
        norm: of the whole gradient, before clipping.
        loss: of this global batch; None where no spike is looked for.
        recent_losses: of the steps before, at most `spike_window`; fewer tell nothing.
    """
    if not math.isfinite(norm):
        return Anomaly(f"the gradient's norm is {norm}", config.on_not_finite)
    if loss is None or config.spike_factor is None or len(recent_losses) < config.spike_window:
        return None
    mean = math.fsum(recent_losses) / len(recent_losses)
    if loss <= config.spike_factor * mean:
        return None
    times = f"{loss / mean:.1f} times the mean of the {len(recent_losses)} steps before"
    return Anomaly(f"the loss is {loss:.4f}, {times}", config.on_spike)


def deal_with(
    anomaly: Anomaly,
    state: RunState,
    rows: Sequence[PackedRow],
    run_directory: Path,
    *,
    writes: bool,
) -> None:
    """Log the anomaly of the step that led to `state`, with the rows of its global batch.

    Args:
        writes: also to `anomalies.jsonl`; at the first rank.

    Raises:
        TrainingError: the policy is to stop.
    """
    what, policy = anomaly.what, anomaly.policy
    path = run_directory / ANOMALIES_NAME
    if writes:
        record = {"step": state.step, "what": what, "policy": policy}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"rows": [row._asdict() for row in rows]}) + "\n")
    batch = f"{name_rows(rows)}; all in {path}"
    if policy == "stop":
        raise TrainingError(
            f"step {state.step}: {what}; nothing was updated. It had {batch}. "
            "`headrace inspect SHARDS --row-key KEY` shows a row's documents; "
            "--resume with a lower optimizer.lr or another policy in [anomalies]"
        )
    done = "the step was taken" if policy == "continue" else "its update was skipped"
    logger.warning("step %d: %s; %s. It had %s", state.step, what, done, batch)


def name_rows(rows: Sequence[PackedRow]) -> str:
    """Return the number of rows, and the first ones by source and key."""
    first = ", ".join(f"{row.source} {row.row_key}" for row in rows[:SHOWN_ROWS])
    return f"{len(rows)} rows, first {first}"
