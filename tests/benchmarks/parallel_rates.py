"""Long rows and parallel dimensions on GPUs: tokens/s, share of the products' rate, peak memory.

    python tests/benchmarks/parallel_rates.py --list
    python tests/benchmarks/parallel_rates.py --only slices          # cases whose name begins so
    python tests/benchmarks/parallel_rates.py --only slices --predict  # peaks, without a GPU
    python tests/benchmarks/parallel_rates.py --tiny                 # all, tiny, on CPU

The real trainer through `bench_train`, each case in processes of its own. A case needs as many GPUs
as its layout has processes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from report import last_line_of, print_table

from headrace.jobs.tools import bench_train

ONE_ROW = ["--micro-batch-size", "1"]
SLICES = [*ONE_ROW, "--sequence", "8192", "--micro-batches", "4", "--windows", "3"]
LONG = [
    *(*ONE_ROW, "--mode", "qlora", "--micro-batches", "1", "--checkpointing", "full"),
    *("--set", "activation_offload=true", "--warmup", "1", "--windows", "1"),
]
KEPT = ["--checkpointing", "attention"]
ROW_128K = [*LONG, "--sequence", "131072", "--set", "tiles=8"]
ROW_512K = [
    *(*LONG, "--sequence", "524288", "--set", "tiles=32"),
    *("--set", "model_overrides.max_position_embeddings=524288"),
]
BIG = [
    *("--preset", "llama-70b", "--mode", "qlora", "--stages", "2", "--sequence", "2048"),
    *(*ONE_ROW, "--micro-batches", "8", "--checkpointing", "full", "--memory", "22"),
    *("--optimizer", "adamw_kahan", "--set", "quantization.embedding=true"),
    *("--set", "partition=[41,39]", "--warmup", "1", "--windows", "2"),
]
FULL = [
    *("--mode", "full", "--replicas", "2", "--sequence", "2048", *ONE_ROW),
    *("--micro-batches", "8", "--checkpointing", "full", "--warmup", "1", "--windows", "2"),
]
# name -> what bench_train is asked for
CASES = {
    "slices: 8B LoRA, 4 x 8,192, one GPU": SLICES,
    "slices: 2 stages, 4 slices": [*SLICES, "--stages", "2", "--set", "sequence_slices=4"],
    "slices: 2 stages, whole rows": [*SLICES, "--stages", "2"],
    "long: 8B QLoRA, 131,072, 8 of 32 layers": [*ROW_128K, "--layers", "8"],
    "long: 8B QLoRA, 131,072": ROW_128K,
    "attention kept: 8B QLoRA, 131,072, 8 of 32 layers": [*ROW_128K, *KEPT, "--layers", "8"],
    "attention kept: 8B QLoRA, 131,072": [*ROW_128K, *KEPT],
    "attention kept: 8B QLoRA, 524,288, 2 of 32 layers": [*ROW_512K, *KEPT, "--layers", "2"],
    "longer: 8B QLoRA, 524,288, 2 of 32 layers": [*ROW_512K, "--layers", "2"],
    "longer: 8B QLoRA, 524,288, 4 of 32 layers": [*ROW_512K, "--layers", "4", "--warmup", "0"],
    "70B QLoRA, 8 x 2,048, 2 GPUs of 22 GiB": BIG,
    "full: 8B AdamW, 2 replicas": FULL,
    "full: 8B AdamW, 2 replicas, optimizer.shard": [*FULL, "--set", "optimizer.shard=true"],
    "full: 8B AdamW, 2 replicas, optimizer.offload": [*FULL, "--set", "optimizer.offload=true"],
}
TINY = ["--preset", "tiny", "--layers", "4", "--sequence", "128"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--predict", action="store_true", help="what `headrace plan` says, alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--limit", type=float, default=200, help="seconds of one case")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, or be one of the processes that do."""
    options = parse_arguments()
    if options.case:
        print(json.dumps(figures(options)), flush=True)
        return 0
    names = [name for name in CASES if name.startswith(options.only)]
    if options.list:
        print("\n".join(names))
        return 0
    rows, failed = [], 0
    for name in names:
        found = in_a_process(name, options.limit)
        print(json.dumps({"name": name, **found}), flush=True)
        failed += "error" in found
        rows.append([name, *cells(found)])
    columns = ["", "tokens/s", "s/step", "of products", "GiB", "GiB planned", "s in all"]
    print_table("parallel dimensions and long rows", columns, rows)
    return 1 if failed else 0


def in_a_process(name: str, limit: float) -> dict[str, object]:
    """One case's figures, or why there are none."""
    started = time.monotonic()
    found = last_line_of([sys.executable, __file__, "--case", name, *sys.argv[1:]], limit)
    return found | {"all_seconds": round(time.monotonic() - started, 1)}


def figures(options: argparse.Namespace) -> dict[str, object]:
    """Peak as planned, and what was measured."""
    asked = [*CASES[options.case], *(TINY if options.tiny else [])]
    with tempfile.TemporaryDirectory() as scratch:
        given = bench_train.parse_arguments(asked)
        found: dict[str, object] = {}
        if options.predict:
            bench_train.write_inputs(given, "one", Path(scratch))
        else:
            found = bench_train.measure(given, "one", Path(scratch))
        return found | planned(Path(scratch) / "train.toml", given)


def planned(path: Path, given: argparse.Namespace) -> dict[str, object]:
    """GiB of each stage, as `headrace plan` predicts them."""
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train.train_config import TrainConfig
    from headrace.trainer.building.self_check import plan_model
    from headrace.trainer.planning.planned_run import GIB
    from headrace.trainer.planning.run_plan import plan_run

    config = load_config(TrainConfig, path, given.set)
    run = plan_run(config, plan_model(config), bench_train.processes(given))
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    memories = [stage.memory for stage in run.stages]
    return {"planned_gib": [round(memory.peak / GIB, 2) for memory in memories]} | {
        f"planned_{part}": [round(getattr(memory, part) / GIB, 2) for memory in memories]
        for part in parts
    }


def cells(found: dict[str, object]) -> list[str]:
    """A row of the table."""
    if "error" in found:
        return [str(found["error"]), *[""] * 5]
    keys = ("tokens_per_second", "seconds", "matmul_share", "peak_gib")
    measured = [str(found.get(key, "")) for key in keys]
    return [*measured, str(found["planned_gib"]), str(found["all_seconds"])]


if __name__ == "__main__":
    sys.exit(main())
