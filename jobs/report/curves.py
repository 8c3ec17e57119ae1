"""Curves over steps as SVG, thinned so that a page of 100,000 steps stays small."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

MOST_POINTS = 600  # about as many as a curve has pixels on a screen
COLORS = ("#2f6f9f", "#c05028", "#4a8a3a", "#8a5aa8", "#b08020", "#3a8f8f", "#a03060", "#606060")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Thinned:
    """A curve by buckets of equally many steps: the middle step, mean, least and largest value.

    `low` and `high` equal `mean` where a bucket holds one point.
    """

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(points: Points) -> Thinned | None:
    """Return at most `MOST_POINTS` buckets of the finite points; None where there are none."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return None
    table = np.asarray(finite, dtype=np.float64)
    buckets = np.array_split(table, min(len(table), MOST_POINTS))
    return Thinned(
        np.asarray([np.median(bucket[:, 0]) for bucket in buckets]),
        np.asarray([bucket[:, 1].mean() for bucket in buckets]),
        np.asarray([bucket[:, 1].min() for bucket in buckets]),
        np.asarray([bucket[:, 1].max() for bucket in buckets]),
    )


def draw(
    title: str, curves: Mapping[str, Points], label: str, marked: frozenset[str] = frozenset()
) -> str:
    """Return an SVG element with curves over steps; an empty text where no value is finite.

    Args:
        title: tells the element's own names from those of others in the page.
        label: what the values are, with their unit.
        marked: names of curves of few points, drawn as points joined by a dashed line.
    """
    thinned = {name: found for name, points in curves.items() if (found := thin(points))}
    if not thinned:
        return ""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, curve) in enumerate(thinned.items()):
            color = COLORS[number % len(COLORS)]
            dashed = name in marked
            axes.plot(
                curve.step,
                curve.mean,
                color=color,
                linewidth=1.3,
                label=shown(name),
                marker="o" if dashed or len(curve.step) == 1 else "",
                markersize=3.5,
                linestyle="--" if dashed else "-",
            )
            axes.fill_between(curve.step, curve.low, curve.high, color=color, alpha=0.18, lw=0)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(thinned) > 1:
            axes.legend(frameon=False, fontsize=8)
        return as_element(figure)


def shown(name: str) -> str:
    """Return a name that a legend shows: one that begins with an underscore is left out of it."""
    return f" {name}" if name.startswith("_") else name


def as_element(figure: Figure) -> str:
    """Return a figure as an SVG element that can stand in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r' (width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
