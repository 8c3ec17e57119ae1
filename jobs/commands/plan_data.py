"""`headrace plan-data`: what a training run will see, step by step, without a GPU or torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from headrace.schemas.publish import write_atomic
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.simulation import SimulatedStep, loader_memory, simulate
from headrace.trainer.preflight import check

BARS = "▁▂▃▄▅▆▇█"
PLOT_POINTS = 40
MIB = 1 << 20


@dataclass(frozen=True)
class SourcePlan:
    """One source over the whole run."""

    name: str
    tokens: int
    shares: list[float]  # of the tokens of each of up to PLOT_POINTS stretches of steps


def plan_data(
    config: TrainConfig, processes: int, console: Console, picture: Path | None, table: Path | None
) -> list[SimulatedStep]:
    """Go through the run and print what it sees.

    Args:
        picture: PNG or SVG file for the mixture over the steps.
        table: JSONL file with a line for each step.

    Raises:
        ConfigError, DataError: what `headrace train` would refuse.
    """
    inputs = check(config, processes)
    steps = list(follow(config, inputs, console))
    sources = plan_sources(steps)
    print_plan(config, inputs, steps, sources, console)
    if table is not None:
        write_atomic(table, "".join(json.dumps(asdict(step)) + "\n" for step in steps))
        console.print(f"{table}: written", highlight=False)
    if picture is not None:
        draw(steps, sources, picture)
        console.print(f"{picture}: written", highlight=False)
    return steps


def follow(config: TrainConfig, inputs: Inputs, console: Console) -> list[SimulatedStep]:
    """Simulate all steps under a progress bar."""
    columns = (
        TextColumn("reading lengths"),
        BarColumn(),
        TextColumn("{task.fields[at]}", markup=False),
    )
    end = config.max_steps or inputs.plan.rows_in(config.epochs or 1)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=end, at="")
        steps = []
        for step in simulate(config, inputs):
            steps.append(step)
            done = step.step if config.max_steps else step.next_row
            bar.update(task, completed=done, at=f"step {step.step:,}")
    return steps


def plan_sources(steps: Sequence[SimulatedStep]) -> list[SourcePlan]:
    """Each source's tokens, in all and by stretch of steps."""
    points = min(PLOT_POINTS, len(steps))
    borders = [len(steps) * point // points for point in range(points + 1)]
    stretches = [steps[first:stop] for first, stop in pairwise(borders)]
    totals = [sum(step.tokens for step in stretch) for stretch in stretches]
    plans = []
    for name in sorted({name for step in steps for name in step.source_tokens}):
        tokens = [sum(step.source_tokens.get(name, 0) for step in part) for part in stretches]
        shares = [own / total for own, total in zip(tokens, totals, strict=True)]
        plans.append(SourcePlan(name, sum(tokens), shares))
    return plans


def sparkline(shares: Sequence[float]) -> str:
    """Shares from 0 to 1 as bars; only 0 gives a blank."""
    return "".join(
        BARS[min(int(share * len(BARS)), len(BARS) - 1)] if share else " " for share in shares
    )


def print_plan(
    config: TrainConfig,
    inputs: Inputs,
    steps: Sequence[SimulatedStep],
    sources: Sequence[SourcePlan],
    console: Console,
) -> None:
    """The table of sources, and what holds for the whole run."""
    tokens = sum(step.tokens for step in steps)
    mixture = Table("source", "mixture over the steps", title="", title_justify="left")
    mixture.add_column("tokens", justify="right")
    mixture.add_column("share", justify="right")
    for source in sources:
        share = f"{source.tokens / tokens:.2%}"
        mixture.add_row(source.name, sparkline(source.shares), f"{source.tokens:,}", share)
    console.print(mixture)
    places = sum(step.tokens / step.fill for step in steps) / inputs.sequence_tokens
    facts = {
        "steps": (
            f"{len(steps):,} of {inputs.global_batch_rows} sequences of {inputs.sequence_tokens:,}"
        ),
        "epochs": f"{steps[-1].epoch:.3f} of {inputs.rows_per_epoch:,} rows",
        "rows": f"{sum(step.rows for step in steps):,}",
        "tokens": f"{tokens:,}, {tokens / len(steps):,.0f} a step",
        "fill": f"{tokens / (places * inputs.sequence_tokens):.2%}, by step "
        f"{min(step.fill for step in steps):.2%} to {max(step.fill for step in steps):.2%}",
        "overlong": f"{sum(step.overlong_rows for step in steps):,} rows, "
        f"{sum(step.overlong_tokens for step in steps):,} tokens left out",
        "read": f"{steps[-1].row_groups_read:,} row groups, "
        f"{steps[-1].bytes_read / MIB:,.1f} MiB by each of {inputs.dims.replicas} leader(s)",
        "host memory": f"at most about {loader_memory(config, inputs) / MIB:,.0f} MiB a leader",
    }
    for name, value in facts.items():
        console.print(f"{name:<12} {value}", highlight=False)


def draw(steps: Sequence[SimulatedStep], sources: Sequence[SourcePlan], picture: Path) -> None:
    """The share of each source, stacked, by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    points = len(sources[0].shares)
    middles = [(point + 0.5) * len(steps) / points for point in range(points)]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=130, layout="constrained")
    axes.stackplot(
        middles,
        [source.shares for source in sources],
        labels=[f"{source.name}, {source.tokens:,} tokens" for source in sources],
    )
    axes.set(xlabel="step", ylabel="share of the tokens", xlim=(0, len(steps)), ylim=(0, 1))
    axes.legend(loc="lower right", fontsize=7)
    figure.savefig(picture)
    pyplot.close(figure)
