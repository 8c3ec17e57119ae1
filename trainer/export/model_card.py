"""README.md and a curve beside a result: what it was made of, and how training went."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from headrace.schemas.publish import write_atomic
from headrace.schemas.train.run_state import RUN_CONFIG_NAME, read_metrics

CARD, CURVE = "README.md", "loss.svg"
WIDTH, HEIGHT, MARGIN = 640, 320, 48
Points = Sequence[tuple[float, float]]


def write_card(directory: Path, run: Path, step: int) -> None:
    """Write `README.md` and `loss.svg` into a result.

    Args:
        run: run directory, with train.json and metrics.jsonl.
        step: of the result; what was logged later is left out.
    """
    record = json.loads((run / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
    metrics = [line for line in read_metrics(run).lines if line["step"] <= step]
    train = [(line["step"], line["loss"]) for line in metrics if line["kind"] == "train"]
    evaluations: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        if line["kind"] == "evaluation":
            evaluations.setdefault(line["name"], []).append((line["step"], line["loss"]))
    if train or evaluations:
        write_atomic(directory / CURVE, curve({"train": train, **evaluations}))
    write_atomic(directory / CARD, card(record, step, train, evaluations))


def card(
    record: dict[str, Any],
    step: int,
    train: Points,
    evaluations: dict[str, list[tuple[float, float]]],
) -> str:
    """The text of the card, with the metadata that the hub reads at its head."""
    config = record["config"]
    datasets = ", ".join(f"`{dataset['path']}`" for dataset in config["datasets"])
    lines = [
        "---",
        f"base_model: {json.dumps(config['model'])}",
        "tags: [headrace]",
        "---",
        "",
        f"# {Path(config['output_dir']).name}",
        "",
        f"`{config['model']}`, trained with Headrace for {step:,} steps on {datasets}.",
        "",
        "| | loss before | loss after |",
        "| --- | --- | --- |",
    ]
    named = {f"evaluation on {name}": points for name, points in evaluations.items()}
    for name, points in {"train": train, **named}.items():
        if points:
            lines.append(f"| {name} | {points[0][1]:.4f} | {points[-1][1]:.4f} |")
    if train or evaluations:
        lines += ["", f"![loss over steps]({CURVE})"]
    lines += ["", f"Fingerprint of the data: `{record.get('fingerprint of the data')}`"]
    config_text = json.dumps(config, indent=1, ensure_ascii=False)
    return "\n".join([*lines, "", "## Config", "", "```json", config_text, "```", ""])


def curve(series: dict[str, Points]) -> str:
    """Lines over steps as an SVG image."""
    shown = {name: points for name, points in series.items() if points}
    steps = [step for points in shown.values() for step, _ in points]
    losses = [loss for points in shown.values() for _, loss in points]
    left, right, low, high = min(steps), max(steps), min(losses), max(losses)

    def place(step: float, loss: float) -> str:
        x = MARGIN + (step - left) / ((right - left) or 1) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (loss - low) / ((high - low) or 1) * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for number, (name, points) in enumerate(shown.items()):
        color = f"hsl({number * 137 % 360},60%,45%)"
        line = " ".join(place(step, loss) for step, loss in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>')
        at = f'x="{MARGIN + 110 * number}" y="20"'
        parts.append(f'<text {at} fill="{color}">{escape(name)}</text>')
    foot, top = HEIGHT - MARGIN, MARGIN
    for x, y, anchor, text in (
        (MARGIN, HEIGHT - 20, "start", f"step {left:g}"),
        (WIDTH - MARGIN, HEIGHT - 20, "end", f"step {right:g}"),
        (MARGIN - 4, foot, "end", f"{low:.2f}"),
        (MARGIN - 4, top, "end", f"{high:.2f}"),
    ):
        parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')
    axes = f'<path d="M{MARGIN},{top}V{foot}H{WIDTH - MARGIN}" fill="none" stroke="#999"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
    )
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{axes}{"".join(parts)}</svg>\n'
