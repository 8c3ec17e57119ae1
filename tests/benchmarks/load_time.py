"""Seconds from launch to the first finished step, and bytes that each process reads, for a model of
several files on local disk. The files lie in the page cache, as they have just been written.

    python tests/benchmarks/load_time.py --folder /local/disk
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from report import print_table

from headrace.jobs.commands.launch import launch
from headrace.jobs.tools import bench_train
from headrace.jobs.tools.bench_checkpoint import write_weights
from headrace.jobs.tools.bench_inputs import PRESETS, write_model

LIMIT_SECONDS = 60
GIB = 1 << 30
MODES = {"lora": "bfloat16", "qlora": "NF4"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on a local disk; default: the temporary one")
    parser.add_argument("--preset", choices=PRESETS, default="llama-8b")
    parser.add_argument("--layers", type=int, help="instead of the preset's number")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rank-arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Write the model, then train a step of each layout; fails where one takes too long."""
    options = parse_arguments()
    if options.rank_arguments:
        return run_rank(options.rank_arguments)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "model"
        write_model(model, options.preset, options.layers)
        stored = write_weights(model)
        cases = [(mode, stages) for mode in MODES for stages in options.stages]
        found = [first_step(options, Path(scratch), model, *case) for case in cases]
    rows = [
        [f"{MODES[mode]}, {stages} stage(s)", f"{seconds:.1f}", reads]
        for (mode, stages), (seconds, reads) in zip(cases, found, strict=True)
    ]
    title = f"{options.preset}, {stored / GIB:.2f} GiB stored"
    print_table(title, ["", "seconds to the first step", "GiB read by each process"], rows)
    return int(any(seconds > LIMIT_SECONDS for seconds, _ in found))


def first_step(
    options: argparse.Namespace, scratch: Path, model: Path, mode: str, stages: int
) -> tuple[float, str]:
    """Seconds, and GiB read by each process."""
    folder = scratch / f"{mode}-{stages}"
    asked = ["--preset", options.preset, "--mode", mode, "--stages", str(stages)]
    asked += ["--sequence", str(options.sequence), "--micro-batch-size", "1", "--windows", "1"]
    asked += ["--warmup", "0", "--micro-batches", "2", "--checkpointing", "full"]
    if options.layers:
        asked += ["--layers", str(options.layers)]
    bench_train.write_inputs(bench_train.parse_arguments(asked), "one", folder)
    settings = [f'model="{model}"', 'weights="stored"', "max_steps=1"]
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--rank-arguments", "--config", str(folder / "train.toml"), "--debug", *sets]
    started = time.time()
    code = launch("load_time", arguments, stages)
    if code:
        raise SystemExit(f"{mode}, {stages} stage(s): exit code {code}")
    seconds = (folder / "run" / "metrics.jsonl").stat().st_mtime - started
    reads = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in range(stages)]
    return seconds, ", ".join(f"{count / GIB:.2f}" for count in reads)


def run_rank(arguments: list[str]) -> int:
    """One training process, which leaves behind how many bytes it has read, of whatever files."""
    from headrace.trainer.main import main as train

    code = train(arguments)
    lines = Path("/proc/self/io").read_text().splitlines()
    count = next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
    folder = Path(arguments[arguments.index("--config") + 1]).parent
    (folder / f"read-{os.environ['RANK']}.json").write_text(json.dumps(count))
    return code


if __name__ == "__main__":
    sys.exit(main())
