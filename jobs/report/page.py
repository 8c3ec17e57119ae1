"""The page of a run: one HTML file with everything in it, readable without a network."""

import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from headrace.jobs.report.curves import Points, draw
from headrace.jobs.report.run_record import Line, RunRecord, read_run
from headrace.jobs.report.waits import time_shares
from headrace.schemas.publish import write_atomic, writing
from headrace.schemas.train.run_state import METRICS_NAME, RUN_CONFIG_NAME

PAGE_NAME = "report.html"
WATCHED = (METRICS_NAME, "answers.jsonl", "checkpoints", RUN_CONFIG_NAME)
TEMPLATE = "page.html.jinja"
STEP_CURVES = {  # of a step's line: title, its fields with their names in the legend, unit
    "Learning rate": ({"lr": "learning rate"}, "learning rate"),
    "Gradient norm": ({"gradient_norm": "gradient norm"}, "norm before clipping"),
    "Speed": ({"tokens_per_second": "tokens per second"}, "tokens per second"),
    "Seconds of a step": ({"seconds": "step", "data_seconds": "wait for data"}, "seconds"),
    "Memory of the fullest process": ({"memory_gib": "memory"}, "GiB"),
    "How full batches are": ({"fill": "fill", "trained_share": "trained share"}, "share"),
    "Router loss": ({"router_loss": "router loss"}, "loss"),
    "Norms of what adapters add": (
        {
            "product_norm_mean": "mean",
            "product_norm_min": "smallest",
            "product_norm_max": "largest",
        },
        "norm",
    ),
}
PAIR_CURVES = {
    "Accuracy of pairs": ({"accuracy": "accuracy"}, "share"),
    "Rewards": (
        {"chosen_reward": "chosen", "rejected_reward": "rejected", "margin": "margin"},
        "reward",
    ),
}


@dataclass(frozen=True)
class Section:
    """A picture with its title."""

    title: str
    svg: str


def write_report(run: Path, output: Path | None = None, refresh: int | None = None) -> Path:
    """Write the page of a run, and return where it lies.

    Args:
        output: default: `report.html` in the run.
        refresh: seconds after which a browser reads the page again.

    Raises:
        DataError: there is no run.
        OutputError: the page cannot be written.
    """
    path = output or run / PAGE_NAME
    page = render(read_run(run), refresh)
    with writing(path, "give another --output"):
        write_atomic(path, page)
    return path


def watch(
    run: Path, output: Path | None, seconds: int, pause: Callable[[float], None] = time.sleep
) -> Iterator[Path]:
    """Yield after each writing of the page, when the run has written something new. Endless.

    `pause` waits for so many seconds between two looks.
    """
    seen: tuple[int, ...] | None = None
    while True:
        stamp = tuple(
            path.stat().st_mtime_ns if path.exists() else 0
            for path in (run / name for name in WATCHED)
        )
        if stamp != seen:
            yield write_report(run, output, seconds)
            seen = stamp
        pause(seconds)


def render(run: RunRecord, refresh: int | None = None) -> str:
    """Return the page. All text of the run is escaped."""
    import jinja2

    source = files("headrace.jobs.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        run=run,
        name=run.directory.resolve().name,
        refresh=refresh,
        written=datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        facts=facts(run),
        warnings=warnings(run),
        sections=sections(run),
        shares=time_shares(run.directory),
        config=json.dumps(run.config, indent=1, ensure_ascii=False),
        environment={key: value for key, value in run.written.items() if value is not None},
    )


def facts(run: RunRecord) -> dict[str, str]:
    """Return the figures at the head of the page."""
    found = {"model": str(run.config.get("model"))}
    if run.steps:
        last, tokens = run.steps[-1], sum(line["tokens"] for line in run.steps)
        seconds = sum(line["seconds"] for line in run.steps)
        found |= {
            "step": f"{last['step']:,}",
            "epoch": f"{last['epoch']:.2f}",
            "training loss": f"{last['loss']:.4f}",
            "tokens": f"{tokens:,}",
            "time in steps": str(datetime.timedelta(seconds=round(seconds))),
            "tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
        }
    if run.checkpoints:
        found["newest checkpoint"] = run.checkpoints[-1]
    return found


def warnings(run: RunRecord) -> list[str]:
    """Return what a reader has to know before the curves."""
    found = []
    if not run.steps:
        found.append("No step is written down yet.")
    if run.steps and not run.evaluations:
        found.append("No evaluation is written down: [evaluation] or evaluation data is missing.")
    if bad := run.not_finite:
        found.append(
            f"The loss of {len(bad):,} step(s) is NaN or infinite, first of step {bad[0]:,}; "
            "curves leave these out."
        )
    if run.damaged:
        found.append(f"{run.damaged:,} line(s) of metrics.jsonl cannot be read and are left out.")
    return found


def sections(run: RunRecord) -> list[Section]:
    """Return the pictures, those without values left out."""
    evaluations = {
        f"evaluation: {found.name}": points(found.lines, "loss") for found in run.evaluations
    }
    marked = frozenset(evaluations)
    unit = "loss (nats per token)"
    losses = {"training": points(run.steps, "loss"), **evaluations}
    drawn = [section("Loss", losses, unit, marked)]
    pairs = [line["pairs"] | {"step": line["step"]} for line in run.steps if line.get("pairs")]
    for lines, curves in ((pairs, PAIR_CURVES), (run.steps, STEP_CURVES)):
        for title, (fields, label) in curves.items():
            series = {name: points(lines, field) for field, name in fields.items()}
            drawn.append(section(title, series, label))
    drawn.append(section("Loss by source", by_source(run.steps, "source_losses"), unit))
    mixture = by_source([line | {"mix": mixture_of(line)} for line in run.steps], "mix")
    drawn.append(section("Data mixture", mixture, "share of the tokens"))
    return [picture for picture in drawn if picture.svg]


def section(
    title: str, curves: Mapping[str, Points], label: str, marked: frozenset[str] = frozenset()
) -> Section:
    """Return a picture of curves."""
    return Section(title, draw(title, curves, label, marked))


def points(lines: list[Line], field: str) -> Points:
    """Return a field over steps, where it is known."""
    return [(line["step"], float(line[field])) for line in lines if line.get(field) is not None]


def mixture_of(line: Line) -> dict[str, float]:
    """Return each source's share of the tokens of a step."""
    tokens: dict[str, Any] = line.get("source_tokens") or {}
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()} if total else {}


def by_source(lines: list[Line], field: str) -> dict[str, Points]:
    """Return the values of each source over steps; empty where there is one source alone."""
    names = sorted({name for line in lines for name in line.get(field) or {}})
    if len(names) < 2:
        return {}
    return {
        name: [
            (line["step"], value)
            for line in lines
            if math.isfinite(value := (line.get(field) or {}).get(name, math.nan))
        ]
        for name in names
    }
