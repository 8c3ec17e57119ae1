"""`make demo`: real text to a fine-tuned real model over two pipeline stages, through the commands.

Everything lands in `demo/`. A second run reuses what is there and says so.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.jobs.commands.machine import count_gpus
from headrace.jobs.tools.plot_run import plot_run
from headrace.schemas.errors import HeadraceError
from headrace.schemas.train.run_state import METRICS_NAME, RUN_CONFIG_NAME, read_metrics

FOLDER = Path("demo")
PROMPT = 'import json\n\n\ndef read_config(path):\n    """'
STAGES = 2

PREPARE = """\
# The Python standard library's own sources, tests left out.
output = "{folder}/shards"
tokenizer = "{model}"
sequence_len = 256
shards = 4
evaluation_fraction = 0.02
max_reject_fraction = 0.01  # some __init__.py are empty; see rejects/ in the output

[[sources]]
name = "stdlib"
type = "text"
path = "{stdlib}/**/*.py"
exclude = ["*/site-packages/*", "*/test/*", "*/tests/*"]
"""

TRAIN = """\
model = "{model}"
output_dir = "{folder}/run"
max_steps = {steps}
micro_batch_size = {micro_batch}
gradient_accumulation_steps = {accumulation}
pipeline_stages = {stages}

[[datasets]]
path = "{folder}/shards"

[[evaluation_datasets]]
path = "{folder}/shards"
name = "stdlib"
max_rows = {evaluation_rows}

[adapter]
kind = "lora"
rank = 16

[optimizer]
lr = 2e-3

[scheduler]
type = "cosine"
warmup_steps = 2
"""


class Demo:
    """The steps of the demo, each a command that a reader could type."""

    def __init__(self, model: Path, console: Console) -> None:
        self.model = model
        self.console = console
        self.folder = FOLDER
        self.run_directory = FOLDER / "run"
        gpus = count_gpus()
        self.processes = min(gpus, STAGES) or STAGES
        self.steps = 100 if gpus else 14
        self.settings = {
            "folder": FOLDER,
            "model": model,
            "stdlib": sysconfig.get_paths()["stdlib"],
            "stages": self.processes,
            "steps": self.steps,
            "micro_batch": 8 if gpus else 1,
            "accumulation": 8,
            "evaluation_rows": 128 if gpus else 12,
        }

    def run(self) -> None:
        started = time.monotonic()
        self.folder.mkdir(exist_ok=True)
        self.write("prepare.toml", PREPARE)
        self.write("train.toml", TRAIN)
        self.title("1. Text to shards")
        self.command("prepare", str(self.folder / "prepare.toml"))
        self.command("verify", str(self.folder / "shards"))
        self.title(f"2. Fine-tuning over {self.processes} pipeline stage(s), stopped half way")
        self.train()
        self.title("3. Adapter into the model")
        if (self.folder / "merged").exists():
            self.say(f"{self.folder}/merged is there already; reused")
        else:
            adapter, merged = str(self.run_directory / "adapter"), str(self.folder / "merged")
            self.command(
                "merge", "--model", str(self.model), "--adapter", adapter, "--output", merged
            )
        self.title("4. What it writes now")
        self.say(PROMPT)
        self.command("sample", str(self.folder / "merged"), PROMPT, "--max-new-tokens", "60")
        picture = self.folder / "loss.png"
        plot_run(self.run_directory, picture, self.stopped_at())
        self.summary(picture, time.monotonic() - started)

    def train(self) -> None:
        """Start, stop by SIGTERM half way, resume."""
        config = str(self.folder / "train.toml")
        arguments = ["train", config, "--gpus", str(self.processes)]
        if (self.run_directory / "adapter").exists():
            self.say(f"{self.run_directory} holds a finished run of these steps; reused")
            return
        if not (self.run_directory / RUN_CONFIG_NAME).exists():
            self.command(*arguments, stop_at=self.steps // 2)
        self.command(*arguments, "--resume")

    def stopped_at(self) -> int:
        """The step of the oldest checkpoint, which SIGTERM left."""
        names = [path.name for path in (self.run_directory / "checkpoints").glob("step-*")]
        return min(int(name.removeprefix("step-")) for name in names)

    def command(self, *arguments: str, stop_at: int | None = None) -> None:
        """Run one `headrace` command; with `stop_at`, send SIGTERM once that step is logged."""
        shown = shlex.join(arguments).replace("\n", "\\n")
        self.console.print(f"$ headrace {shown}", style="bold cyan", highlight=False, markup=False)
        process = subprocess.Popen([sys.executable, "-m", "headrace.jobs.cli", *arguments])
        if stop_at is not None:
            self.stop(process, stop_at)
        if process.wait() != 0:
            raise SystemExit(f"error: `headrace {shown}` failed with code {process.returncode}")

    def stop(self, process: "subprocess.Popen[bytes]", step: int) -> None:
        while process.poll() is None and self.last_step() < step:
            time.sleep(0.1)
        if process.poll() is None:
            self.say(f"(sending SIGTERM after step {step})")
            process.send_signal(signal.SIGTERM)

    def last_step(self) -> int:
        if not (self.run_directory / METRICS_NAME).exists():
            return 0
        return max((line["step"] for line in read_metrics(self.run_directory).lines), default=0)

    def summary(self, picture: Path, seconds: float) -> None:
        """Evaluation loss before and after, and where everything is."""
        before, after = self.evaluation_losses()
        rates: list[float] = sorted(
            line["tokens_per_second"]
            for line in read_metrics(self.run_directory).lines
            if line["kind"] == "train"
        )
        table = Table(title="demo", show_header=False)
        for name, value in (
            ("evaluation loss before", f"{before:.4f}"),
            ("evaluation loss after", f"{after:.4f}"),
            ("tokens/s, median step", f"{rates[len(rates) // 2]:,.0f}"),
            ("loss curve", str(picture)),
            ("shards", f"{self.folder}/shards"),
            ("run: metrics, TensorBoard, checkpoints, adapter", str(self.run_directory)),
            ("merged model", f"{self.folder}/merged"),
            ("seconds", f"{seconds:.0f}"),
        ):
            table.add_row(name, value)
        self.console.print(table)
        if after >= before:
            raise SystemExit("error: fine-tuning did not lower the evaluation loss")

    def evaluation_losses(self) -> tuple[float, float]:
        lines: list[dict[str, Any]] = read_metrics(self.run_directory).lines
        losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
        return losses[0], losses[-1]

    def write(self, name: str, template: str) -> None:
        (self.folder / name).write_text(template.format(**self.settings), encoding="utf-8")

    def title(self, text: str) -> None:
        self.console.rule(text, align="left")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    options = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        Demo(options.model, Console(markup=False, emoji=False)).run()
    except HeadraceError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
