"""`headrace plan`: what each stage of a run will hold and do, as a table, and what makes it fit."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.trainer.planning.changes import toml
from headrace.trainer.planning.planned_run import GIB, RunPlan

UNITS = {"": 1, "B": 1, "MB": 10**6, "MIB": 1 << 20, "GB": 10**9, "GIB": GIB}
SHOWN_REMEDIES = 4
Remedies = Iterable[tuple[Mapping[str, Any], RunPlan]]


def parse_size(text: str) -> float:
    """Bytes of `24GiB`, `80GB` or a plain number.

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f'--memory {text}: not a size; write for example "24GiB"')
    return float(match[1]) * UNITS[match[2].upper()]


def report(run: RunPlan, memory: float | None = None, remedies: Remedies = ()) -> str:
    """The table, and what to change if it does not fit.

    Args:
        memory: bytes of each GPU.
        remedies: changes with which it does; asked for as many as are shown.
    """
    rows = [
        (
            "stage layers parameters trained  weights gradients optimizer activations logits+masks"
            "   peak  work"
        ).split()
    ]
    total = sum(stage.work for stage in run.stages)
    for number, stage in enumerate(run.stages):
        held = stage.memory
        sizes = (
            held.weights,
            held.gradients,
            held.optimizer,
            held.activations,
            held.logits + held.masks,
            held.peak,
        )
        rows.append(
            [
                str(number),
                ", ".join(map(str, stage.layers)),
                f"{stage.weights / 1e6:,.1f}M",
                f"{stage.trained / 1e6:,.1f}M",
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{stage.work / total:.1%}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    config = run.config
    lines += [
        "",
        f"GiB; micro-batches of {config.micro_batch_size} x {run.sequence_len} tokens, "
        f"{config.gradient_accumulation_steps} a step, {run.layout}.",
        f"Bubble {run.bubble:.1%}, balance {run.balance:.1%}, "
        f"expected efficiency {run.efficiency:.1%} of as many GPUs without a pipeline.",
    ]
    return "\n".join(lines + (verdict(run, memory, remedies) if memory else []))


def verdict(run: RunPlan, memory: float, remedies: Remedies) -> list[str]:
    """Say whether the run fits, and if not, the settings with which it would."""
    limit = f"{memory / GIB:.1f} GiB"
    if run.peak <= memory:
        return [f"Fits: the fullest stage takes {run.peak / GIB:.2f} of {limit}."]
    lines = [f"Does not fit: the fullest stage takes {run.peak / GIB:.2f} of {limit}."]
    for number, (change, tried) in enumerate(remedies):
        if number == SHOWN_REMEDIES:
            break
        settings = ", ".join(f"{key} = {toml(value)}" for key, value in change.items())
        lines.append(f"  {settings}: {tried.peak / GIB:.2f} GiB, efficiency {tried.efficiency:.1%}")
    if len(lines) == 1:
        lines.append("  No change of the pipeline makes it fit: use more GPUs, or train less.")
    return lines
