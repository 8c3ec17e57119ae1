"""`headrace control-report`: control adapters layer by layer, as a table and a picture."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.trainer.export.control_analysis import ControlNumbers, analyze
from headrace.trainer.export.control_file import read_control

COLUMNS = (
    "layer",
    "|Q'Q-I|^2",
    "spectral",
    "Frobenius",
    "nuclear",
    "effective rank",
    "condition",
    "inverse error",
)


def control_report(adapter: Path, console: Console, picture: Path | None) -> list[ControlNumbers]:
    """Print the table.

    Args:
        adapter: the `adapter` directory of a run.
        picture: PNG or SVG file to draw norms and effective rank into.

    Raises:
        ConfigError: no control adapters are there.
    """
    layers = [analyze(control) for control in read_control(adapter)]
    table = Table(*COLUMNS, box=None)
    for column in table.columns:
        column.justify = "right"
    for numbers in layers:
        layer, *values = astuple(numbers)
        table.add_row(str(layer), *(f"{value:.4g}" for value in values))
    console.print(table)
    if picture is not None:
        draw(layers, picture)
        console.print(f"{picture}: written", highlight=False)
    return layers


def draw(layers: Sequence[ControlNumbers], picture: Path) -> None:
    """Norms and effective rank by layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=130, layout="constrained")
    numbers = [layer.layer for layer in layers]
    for name in ("spectral_norm", "frobenius_norm", "nuclear_norm"):
        values = [getattr(layer, name) for layer in layers]
        axes.plot(numbers, values, marker=".", label=name.replace("_", " "))
    axes.set(xlabel="layer", ylabel="norm of the change", ylim=(0, None))
    axes.grid(alpha=0.25)
    ranks = axes.twinx()
    ranks.plot(
        numbers, [layer.effective_rank for layer in layers], "k--", label="effective rank (right)"
    )
    ranks.set(ylim=(0, None))
    lines = [*axes.get_lines(), *ranks.get_lines()]
    axes.legend(handles=lines, frameon=False, fontsize=7)
    figure.savefig(picture)
    pyplot.close(figure)
