"""A pipeline step as a picture: `python -m headrace.jobs.tools.plot_timeline runs/demo step.svg`.

Needs a run with `profile.timeline = true`.
"""

import argparse
from pathlib import Path

from headrace.jobs.report.waits import read_timelines

COLORS = {
    "ForwardPass": "#4878a8",
    "BackwardPass": "#6aa84f",
    "OptimizerStep": "#8e63a8",
    "data": "#e0b040",
    "LoadMicroBatch": "#e0b040",
    "answers": "#c07aa8",
    "RecvActivation": "#d98068",
    "RecvGrad": "#d98068",
    "SendActivation": "#b05038",
    "SendGrad": "#b05038",
}
LABELS = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "RecvActivation": "waits for a peer",
    "SendActivation": "sends",
    "OptimizerStep": "optimizer",
    "data": "waits for data",
    "answers": "generates answers",
}


def plot_timeline(run_directory: Path, picture: Path, step: int) -> None:
    """Draw what each process did in one step, counted from 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ranks = read_timelines(run_directory)
    figure, axes = pyplot.subplots(
        figsize=(10, 1.2 + 0.45 * len(ranks)), dpi=130, layout="constrained"
    )
    for rank, steps in enumerate(ranks):
        spans = [
            span
            for line in steps
            if line["step"] == step
            for span in line["spans"]
            if span["name"] in COLORS
        ]
        axes.broken_barh(
            [(span["start"], span["end"] - span["start"]) for span in spans],
            (rank - 0.4, 0.8),
            facecolors=[COLORS[span["name"]] for span in spans],
            edgecolors="white",
            linewidth=0.3,
        )
    axes.set(xlabel="seconds", yticks=range(len(ranks)), ylabel="process")
    axes.invert_yaxis()
    shown = {span["name"] for steps in ranks for line in steps for span in line["spans"]}
    handles = [
        Patch(color=COLORS[name], label=label) for name, label in LABELS.items() if name in shown
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(picture)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--step", type=int, default=2)
    options = parser.parse_args()
    plot_timeline(options.run_directory, options.picture, options.step)


if __name__ == "__main__":
    main()
