"""The loss curve of a run as a picture: `python -m headrace.jobs.tools.plot_run runs/demo`."""

import argparse
from pathlib import Path

from headrace.schemas.errors import DataError
from headrace.schemas.train.run_state import read_metrics


def plot_run(run_directory: Path, picture: Path, resumed_at: int | None = None) -> None:
    """Draw training and evaluation loss by step.

    Args:
        picture: PNG or SVG file to write.
        resumed_at: step at which the run was stopped and resumed, marked in the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(run_directory).lines
    if not metrics:
        raise DataError(f"{run_directory}: no metrics; give the output_dir of a run")
    train = [line for line in metrics if line["kind"] == "train"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=130, layout="constrained")
    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    axes.plot(steps, losses, color="#4878a8", linewidth=1.3, label="training")
    for name in dict.fromkeys(line["name"] for line in metrics if line["kind"] == "evaluation"):
        points = [line for line in metrics if line.get("name") == name]
        axes.plot(
            [line["step"] for line in points],
            [line["loss"] for line in points],
            marker="o",
            linestyle="--",
            color="#c05028",
            label=f"evaluation: {name}",
        )
    if resumed_at is not None:
        axes.axvline(resumed_at + 0.5, color="0.6", linewidth=1, linestyle=":")
        axes.annotate("stopped, resumed", (resumed_at + 0.5, 0.03), rotation=90, color="0.4",
                      xycoords=("data", "axes fraction"), xytext=(-10, 0), fontsize=7,
                      textcoords="offset points")  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--output", type=Path, help="default: loss.png in the run")
    options = parser.parse_args()
    picture = options.output or options.run / "loss.png"
    plot_run(options.run, picture)
    print(f"{picture}: written")


if __name__ == "__main__":
    main()
