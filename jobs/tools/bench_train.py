"""Measures training: `python -m headrace.jobs.tools.bench_train --preset llama-8b --stages 2`.

The real trainer on a real shard directory; only weights and tokens are random. Prints one JSON line
for each --documents. A window is a step; the first steps, which compile, are left out.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from headrace.jobs.commands.launch import launch
from headrace.jobs.report.waits import read_timelines
from headrace.jobs.tools.bench_inputs import write_model, write_shards
from headrace.jobs.tools.bench_shapes import PRESETS, Shape, flops_per_token
from headrace.jobs.tools.plot_timeline import plot_timeline
from headrace.schemas.train.run_state import read_metrics

MATMUL_SIZE, MATMUL_REPEATS = 8192, 20
MODES = {  # name -> what the config has for it
    "lora": "",
    "full": "",
    "qlora": 'quantization = { backend = "bnb", double_quantization = true }',
    "hqq": 'quantization = { backend = "hqq" }',
    "fp8": 'quantization = { backend = "fp8" }',
}
PEERS = ("RecvActivation", "RecvGrad", "SendActivation", "SendGrad")
CONFIG = """\
model = "{folder}/model"
weights = "random"
output_dir = "{folder}/run"
max_steps = {steps}
micro_batch_size = {options.micro_batch_size}
gradient_accumulation_steps = {options.micro_batches}
pipeline_stages = {options.stages}
sequence_parallel = {options.sequence_parallel}
tensor_parallel = {options.tensor_parallel}
activation_checkpointing = "{options.checkpointing}"
kernels = "{options.kernels}"
compile = {compile}
datasets = [{{ path = "{folder}/shards" }}]
adapter = {{ kind = "{adapter}", rank = {options.rank}{experts} }}
{quantization}
optimizer = {{ type = "{options.optimizer}", lr = 1e-5 }}
checkpoint = {{ at_end = false }}

[profile]
timeline = true
{trace}
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="llama-8b")
    parser.add_argument("--layers", type=int, help="instead of the preset's number")
    parser.add_argument("--mode", choices=MODES, default="lora")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, on all linear layers")
    parser.add_argument("--experts", action="store_true", help="adapters on a mixture's experts")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_kahan"], default="adamw")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--sequence-parallel", type=int, default=1)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a replica's step")
    parser.add_argument(
        "--documents",
        nargs="+",
        default=["one"],
        help='"one" a row, or a mean length, packed: one run for each',
    )
    ways = ["none", "selective", "attention", "full"]
    parser.add_argument("--checkpointing", choices=ways, default="none")
    parser.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--windows", type=int, default=5, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--memory", type=float, help="GiB that a process may take of its GPU")
    parser.add_argument("--trace", action="store_true", help="trace the step after the last window")
    parser.add_argument("--keep", type=Path, help="folder for traces, timelines and their picture")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of a training config, as in schedule=interleaved",
    )
    parser.add_argument("--matmul", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, or be the process that measures products of matrices alone."""
    options = parse_arguments(arguments)
    if options.matmul is not None:
        options.matmul.write_text(json.dumps(matmul_rate()))
        return 0
    for documents in options.documents:
        name = f"{options.preset}-{options.mode}-{processes(options)}-{documents}"
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep / name if options.keep else Path(scratch)
            line = measure(options, documents, folder)
            print(json.dumps(line), flush=True)
            if "error" in line:
                return 1
    return 0


def measure(options: argparse.Namespace, documents: str, folder: Path) -> dict[str, object]:
    """Train one configuration in processes of its own; returns the JSON line."""
    shape, lengths = write_inputs(options, documents, folder)
    given = {
        key: getattr(options, key)
        for key in (
            *("preset", "layers", "mode", "rank", "experts", "optimizer", "stages", "replicas"),
            *("sequence_parallel", "tensor_parallel", "sequence", "memory", "micro_batch_size"),
            *("micro_batches", "checkpointing", "kernels", "no_compile", "set"),
        )
    } | {"documents": documents}
    result = run_config(options, folder)
    if "error" in result:
        return given | result
    rate, matmul = result["tokens_per_second"], result["matmul_tflops"]
    tflops = flops_per_token(shape, options.mode, lengths) * rate / processes(options) / 1e12
    if options.keep:
        plot_timeline(folder / "run", folder / "timeline.svg", options.warmup + options.windows)
    return given | result | {"tflops": round(tflops, 1), "matmul_share": round(tflops / matmul, 3)}


def write_inputs(
    options: argparse.Namespace, documents: str, folder: Path
) -> tuple[Shape, list[list[int]]]:
    """Model, shards and train.toml of one configuration.

    Returns:
        The model's config, and the lengths of each row's documents.
    """
    steps = options.warmup + options.windows + options.trace
    shape = write_model(folder / "model", options.preset, options.layers)
    lengths = write_shards(
        folder / "shards",
        folder / "model",
        steps * rows_of_step(options),
        options.sequence,
        shape["vocab_size"],
        None if documents == "one" else int(documents),
    )
    (folder / "train.toml").write_text(
        CONFIG.format(
            folder=folder,
            steps=steps,
            options=options,
            compile=str(not options.no_compile).lower(),
            adapter="none" if options.mode == "full" else "lora",
            experts=', target_parameters = "experts"' if options.experts else "",
            quantization=MODES[options.mode],
            trace=f"trace_step = {steps}" if options.trace else "",
        )
    )
    return shape, lengths


def run_config(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on what `write_inputs` wrote; the run's figures, or its error."""
    arguments = ["--config", str(folder / "train.toml"), "--debug"]
    arguments += [f"--set={setting}" for setting in options.set]
    if options.memory:
        arguments += [f"--memory={options.memory}"]
    code = launch("headrace.trainer.main", arguments, processes(options))
    rates = ["--matmul", str(folder / "run" / "matmul.json")]
    code = code or launch("headrace.jobs.tools.bench_train", rates, 1)
    if code:
        return {"error": f"exit code {code}"}
    measured = slice(options.warmup, options.warmup + options.windows)
    places = rows_of_step(options) * options.sequence
    return summarize(folder / "run", measured, places)


def processes(options: argparse.Namespace) -> int:
    """Return the number of processes of a configuration, one for each GPU."""
    count: int = options.stages * options.replicas
    return count * options.sequence_parallel * options.tensor_parallel


def rows_of_step(options: argparse.Namespace) -> int:
    """Return the rows of a global batch."""
    rows: int = options.micro_batch_size * options.micro_batches * options.replicas
    return rows


def summarize(run: Path, measured: slice, places: int) -> dict[str, Any]:
    """Rates and shares of a run's measured steps. Shares have one number for each stage.

    Args:
        places: tokens that a step has room for.
    """
    steps = read_metrics(run).lines[measured]
    rates = [step["tokens_per_second"] for step in steps]
    timelines = [stage[measured] for stage in read_timelines(run)]

    def shares(names: Iterable[str]) -> list[float]:
        return [
            round(median(seconds_in(step, names) / step["seconds"] for step in stage), 4)
            for stage in timelines
        ]

    return {
        "tokens_per_second": round(median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "seconds": round(median(step["seconds"] for step in steps), 4),
        "peak_gib": round(max(step["memory_gib"] for step in steps), 2),
        "fill": round(sum(step["tokens"] for step in steps) / (places * len(steps)), 4),
        "data_share": shares(["data"]),
        "peers_share": shares(PEERS),
        "optimizer_share": shares(["OptimizerStep"]),
        "loss": round(steps[-1]["loss"], 4),
        **json.loads((run / "matmul.json").read_text()),
    }


def seconds_in(step: dict[str, Any], names: Iterable[str]) -> float:
    return sum(span["end"] - span["start"] for span in step["spans"] if span["name"] in names)


def matmul_rate() -> dict[str, object]:
    """Rate of a large bfloat16 matrix product of random numbers in this process."""
    import torch

    from headrace.trainer import devices

    device = torch.device(devices.device_type())
    on_gpu = devices.is_accelerator(device)
    size = MATMUL_SIZE if on_gpu else 512
    devices.free_unused(device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        devices.synchronize(device)
        return time.perf_counter() - start

    seconds(5)
    rate = 2 * size**3 * MATMUL_REPEATS / seconds(MATMUL_REPEATS) / 1e12
    return {"matmul_tflops": round(rate, 3), "device": devices.device_name()}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    sys.exit(main())
