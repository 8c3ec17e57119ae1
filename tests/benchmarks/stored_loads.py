"""Bytes and memory of loading each stage of a model whose files are quantized, in a process of its
own, one after the other on one device. The files are random, in the published layout, just written.

    python tests/benchmarks/stored_loads.py --folder /local/disk          # FP8 blocks and MXFP4
    python tests/benchmarks/stored_loads.py --cases fp8 --held bfloat16 nf4 --stages 2
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import print_table

from headrace.jobs.tools.bench_inputs import write_model
from headrace.trainer.building.built_stage import BuiltStage

GIB = 1 << 30
CLEAR_PEAK = "5"  # proc(5), clear_refs
MOST = 1.15
CASES = {"fp8": ("llama-8b", None), "mxfp4": ("gpt-oss-20b", 9)}  # layout -> preset, layers
HELD = {"bfloat16": None, "fp8": {"backend": "fp8"}, "nf4": {"backend": "bnb"}}
COLUMNS = ["files, held, stage", "seconds", "GiB read", "read / stored", "GiB held", "peak / held"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on a local disk; default: the temporary one")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--held", nargs="+", choices=HELD, default=["bfloat16", "nf4"])
    parser.add_argument("--preset", help="in place of the usual shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "HELD", "STAGE"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write each model and load its stages; fails where a model costs more than its bytes."""
    options = parse_arguments(arguments)
    if options.one:
        model, held, stage = options.one
        print(json.dumps(load(Path(model), held, int(stage), options.stages)), flush=True)
        return 0
    rows, failed = [], False
    for layout in options.cases:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            model = Path(scratch) / "model"
            stored = write(model, layout, options)
            for held in options.held:
                found = [
                    in_a_process(model, held, n, options.stages) for n in range(options.stages)
                ]
                failed |= sum(cost["read"] for cost in found) > MOST * stored
                rows += table_rows(f"{layout}, {held}", found, stored)
    print_table("loading files that are quantized", COLUMNS, rows)
    return int(failed)


def write(model: Path, layout: str, options: argparse.Namespace) -> int:
    """Write one model; returns the bytes of its tensors."""
    from headrace.jobs.tools.bench_checkpoint import write_weights

    started = time.monotonic()
    preset, layers = CASES[layout]
    write_model(model, options.preset or preset, options.layers or layers)
    stored = write_weights(model, layout)
    seconds = time.monotonic() - started
    print(f"{layout}: {stored / GIB:.2f} GiB written in {seconds:.0f} s", flush=True)
    return stored


def in_a_process(model: Path, held: str, stage: int, stages: int) -> dict[str, float]:
    """Load one stage in a process of its own."""
    asked = [str(model), held, str(stage), "--stages", str(stages)]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *asked], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def load(model: Path, held: str, stage: int, stages: int) -> dict[str, float]:
    """Build one stage and return what it cost: of a tiny model first, for imports and contexts."""
    from headrace.trainer import devices

    device = torch.device(devices.device_type())
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny"
        write_model(tiny, "tiny", None)
        build(tiny, held, 0, 1, device, weights="random")
    gc.collect()
    devices.free_unused(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    before, read, started = status("VmRSS"), bytes_read(), time.monotonic()
    occupied = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    built = build(model, held, stage, stages, device)
    found = {"seconds": time.monotonic() - started, "read": bytes_read() - read}
    found["host"] = status("VmHWM") - before
    if device.type != "cuda":
        tensors = [*built.stage.parameters(), *built.stage.buffers()]
        return found | {"held": sum(t.nbytes for t in tensors), "device": 0}
    torch.cuda.synchronize()
    peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return found | {"held": now - occupied, "device": peak - occupied}


def build(
    model: Path,
    held: str,
    stage: int,
    stages: int,
    device: torch.device,
    weights: str = "stored",
) -> BuiltStage:
    """Build one stage as a run does."""
    from headrace.schemas.train.train_config import TrainConfig
    from headrace.trainer.building import model_builder
    from headrace.trainer.building.self_check import plan_model

    config = TrainConfig.model_validate(
        {
            "model": str(model),
            "weights": weights,
            "output_dir": str(model.parent / "run"),
            "datasets": [{"path": str(model.parent / "shards")}],
            "optimizer": {"type": "adamw", "lr": 1e-5},
            "pipeline_stages": stages,
            "dtype": "bfloat16",
            "adapter": {"kind": "lora", "rank": 8, "target_modules": ["q_proj", "v_proj"]},
            "quantization": HELD[held],
        }
    )
    return model_builder.build_stage(config, stage, device, plan_model(config))


def status(name: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def bytes_read() -> int:
    """Bytes that this process has read, of whatever files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def table_rows(name: str, found: list[dict[str, float]], stored: int) -> list[list[str]]:
    """A row for each stage, and one for all."""
    rows = []
    for stage, cost in enumerate(found):
        peak = (cost["device"] + cost["host"]) / cost["held"]
        share, held = cost["read"] / stored, cost["held"] / GIB
        figures = [f"{cost['read'] / GIB:.2f}", f"{share:.3f}", f"{held:.2f}", f"{peak:.3f}"]
        rows.append([f"{name}, {stage + 1}", f"{cost['seconds']:.1f}", *figures])
    read = sum(cost["read"] for cost in found)
    return [*rows, [f"{name}, all", "", f"{read / GIB:.2f}", f"{read / stored:.3f}", "", ""]]


if __name__ == "__main__":
    sys.exit(main())
