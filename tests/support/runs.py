"""Ways to run training as a user would, and to compare runs bit by bit."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.torch import load_file
from warm_command import run_warm, start_warm

from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig

GPU = Path("/dev/nvidia0")
STDLIB = Path(json.__file__).parents[1]


def make_shards(model, output, **changes):
    """Prepare standard-library sources for a model."""
    settings = {
        "output": str(output),
        "tokenizer": str(model),
        "sequence_len": 64,
        "shards": 3,
        "evaluation_fraction": 0.2,
        "row_group_tokens": 64 * 16,
        "block_bytes": 1 << 14,
        "max_reject_fraction": 1.0,
        "sources": [
            source("json", STDLIB / "json" / "*.py"),
            source("small", STDLIB / "[a-c]*t.py"),
        ],
    }
    prepare(PrepareConfig.model_validate(settings | changes), workers=1)
    return output


def make_answer_shards(model, folder, rows, **changes):
    """Prepare a source of single answers with labels; returns the shard directory."""
    return make_pair_shards(model, folder, "answers", rows, kind="unpaired", **changes)


def make_pair_shards(model, folder, name, rows, kind="preference", **changes):
    """Prepare a source of pairs, given as objects of its fields; returns the shard directory."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output": str(folder / "shards"),
        "tokenizer": str(model),
        "sequence_len": 64,
        "packing": "none",
        "overlong": "drop",
        "evaluation_fraction": 0.2,
        "sources": [{"name": name, "type": kind, "path": str(path)}],
    }
    prepare(PrepareConfig.model_validate(settings | changes), workers=1)
    return folder / "shards"


def source(name, path):
    """Paragraphs as documents, so that most rows hold several."""
    return {"name": name, "type": "text", "path": str(path), "document_separator": "\n\n"}


def complete(command):
    """A `headrace` command to its end; on GPUs, whose contexts outlive no fork, as it is."""
    if GPU.exists():
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return run_warm(command[command.index("headrace.jobs.cli") + 1 :])


def start(command, log, host=None):
    """The same in the background, maybe in a network namespace; its output is added to a log."""
    if GPU.exists():
        return start_cold(command, log, host)
    return start_warm(command[command.index("headrace.jobs.cli") + 1 :], log, host)


def start_cold(command, log, host=None):
    """The same, as a user starts it."""
    if host:
        command = ["ip", "netns", "exec", host, *command]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def children(launcher):
    """The processes that a launcher has started; none once it has ended."""
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def run_ranks(script, processes, *arguments, limit=250):
    """Ranks of a script beside the tests, on CPU, to their end."""
    path = str(Path(__file__).with_name(script))
    done = run_warm([*map(str, arguments)], path, processes, limit)
    assert done.returncode == 0, done.stderr[-3000:]


@dataclass(frozen=True)
class Training:
    """Settings of a run, and the commands for it."""

    directory: Path
    config: Path

    def command(self, processes, *arguments):
        return [
            *(sys.executable, "-m", "headrace.jobs.cli", "train", str(self.config)),
            *("--gpus", str(processes), *arguments),
        ]

    def run(self, name, processes=1, *arguments, **settings):
        """Train to the end in a directory of its own; returns the run directory."""
        run = self.directory / name
        sets = {"output_dir": str(run), **settings}
        options = [part for key, value in sets.items() for part in ("--set", as_toml(key, value))]
        done = complete(self.command(processes, *options, *arguments))
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return run


def as_toml(key, value):
    return f"{key.replace('__', '.')}={json.dumps(value)}"


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact_metrics(run):
    """All that must not differ by a bit: losses, norms and rows of every step and evaluation."""
    names = ("kind", "step", "name", "loss", "source_losses", "gradient_norm", "lr", "rows_sha256")
    names += ("token_summary",)
    return [{name: line.get(name) for name in names} for line in read_metrics(run)]


def checkpoint_tensors(run):
    """Parameters and optimizer states of the newest checkpoint, whatever its layout."""
    newest = max((run / "checkpoints").glob("step-*"))
    tensors = {}
    for file in newest.glob("stage-*.safetensors"):
        tensors |= load_file(file)
    return tensors
