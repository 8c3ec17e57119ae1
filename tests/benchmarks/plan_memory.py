"""What `headrace plan` predicts, against the peak that a GPU measured: the real trainer, random
weights, a few steps of each configuration in a process of its own.

    python tests/benchmarks/plan_memory.py                # all, on one GPU
    python tests/benchmarks/plan_memory.py --only "8B LoRA"  # those with this in their name
    python tests/benchmarks/plan_memory.py --predict      # without a GPU
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from report import last_line_of, print_table

from headrace.jobs.tools import bench_train

LIMIT_SECONDS = 75  # of one configuration
STEPS = ["--warmup", "1", "--windows", "2", "--micro-batches", "2"]
CHECKPOINTED = ["--checkpointing", "full"]
KAHAN = ["--mode", "full", "--optimizer", "adamw_kahan"]
MIXTRAL = ["--preset", "mixtral-8x7b", "--layers", "2"]
# name -> what bench_train is asked for
CASES = {
    "8B LoRA, 1 x 4096": ["--micro-batch-size", "1"],
    "8B LoRA, 2 x 4096": [],
    "8B LoRA, 1 x 4096, checkpointed": ["--micro-batch-size", "1", *CHECKPOINTED],
    "8B LoRA, 2 x 4096, checkpointed": CHECKPOINTED,
    "8B LoRA, 1 x 2048, plain modules": [
        *("--micro-batch-size", "1", "--sequence", "2048"),
        *("--kernels", "torch", "--no-compile"),
    ],
    "8B NF4 twice, 2 x 2048, checkpointed": [
        *("--mode", "qlora", "--sequence", "2048", *CHECKPOINTED)
    ],
    "8B HQQ, 2 x 2048, checkpointed": ["--mode", "hqq", "--sequence", "2048", *CHECKPOINTED],
    "8B LoRA, 2 x 2048, checkpointed, MLPs and embedding in host memory": [
        *("--sequence", "2048", *CHECKPOINTED),
        *("--set", "weight_offload=mlp", "--set", "embedding_on_cpu=true"),
    ],
    "8B LoRA, 1 x 2048, MLPs in host memory": [
        *("--sequence", "2048", "--micro-batch-size", "1", "--set", "weight_offload=mlp")
    ],
    "8B of 16 layers, all weights, AdamW-Kahan, 1 x 4096": [
        *("--layers", "16", "--micro-batch-size", "1", *KAHAN)
    ],
    "1B, all weights, AdamW, 1 x 4096": [
        *("--preset", "llama-1b", "--mode", "full", "--micro-batch-size", "1")
    ],
    "Mixtral of 2 layers, LoRA on experts, 1 x 2048": [
        *(*MIXTRAL, "--experts", "--micro-batch-size", "1", "--sequence", "2048")
    ],
    "hybrid of Qwen3.5 9B, LoRA, 1 x 4096, checkpointed": [
        *("--preset", "qwen3.5-9b", "--micro-batch-size", "1", *CHECKPOINTED)
    ],
    "hybrid of Qwen3.5 9B, 8 layers, LoRA, 1 x 4096": [
        *("--preset", "qwen3.5-9b", "--layers", "8", "--micro-batch-size", "1")
    ],
    "hybrid mixture of Qwen3-Next, 4 layers, LoRA, 1 x 4096": [
        *("--preset", "qwen3-next-80b-a3b", "--layers", "4", "--micro-batch-size", "1")
    ],
    "latent attention of DeepSeek-V3 16B, 8 layers, LoRA, 1 x 4096": [
        *("--preset", "deepseek-v3-16b", "--layers", "8", "--micro-batch-size", "1")
    ],
    "latent attention of DeepSeek-V3 16B, 8 layers, LoRA, 1 x 4096, checkpointed": [
        *("--preset", "deepseek-v3-16b", "--layers", "8", "--micro-batch-size", "1"),
        *CHECKPOINTED,
    ],
    "gpt_oss 20B, LoRA, 1 x 4096, checkpointed": [
        *("--preset", "gpt-oss-20b", "--micro-batch-size", "1", *CHECKPOINTED)
    ],
    "gpt_oss 20B, 8 layers, LoRA, 1 x 4096": [
        *("--preset", "gpt-oss-20b", "--layers", "8", "--micro-batch-size", "1")
    ],
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="configurations with this in their name")
    parser.add_argument("--predict", action="store_true", help="do not train")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, or be one of the processes that do."""
    options = parse_arguments()
    if options.case:
        print(json.dumps(figures(options.case, train=not options.predict)), flush=True)
        return 0
    rows, failed = [], 0
    for name in CASES:
        if options.only in name:
            found = in_a_process(name, options.predict)
            print(json.dumps({"name": name, **found}), flush=True)
            failed += "error" in found
            rows.append([name, *cells(found)])
    columns = ["configuration", "predicted GiB", "measured GiB", "measured / predicted", "seconds"]
    print_table("peak memory of one GPU", columns, rows)
    return 1 if failed else 0


def in_a_process(name: str, predict: bool) -> dict[str, object]:
    """One configuration's figures, or why there are none."""
    command = [sys.executable, __file__, "--case", name, *(["--predict"] if predict else [])]
    started = time.monotonic()
    found = last_line_of(command, LIMIT_SECONDS)
    return found | {"seconds": round(time.monotonic() - started, 1)}


def figures(name: str, *, train: bool) -> dict[str, object]:
    """GiB as predicted, and as measured."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = bench_train.parse_arguments([*STEPS, *CASES[name], "--keep", str(folder)])
        bench_train.write_inputs(options, "one", folder)
        found = predict(folder / "train.toml", options.set)
        if train:
            measured = bench_train.run_config(options, folder)
            found |= {key: measured[key] for key in ("peak_gib", "loss", "seconds", "device")}
        return found


def predict(config: Path, settings: list[str]) -> dict[str, object]:
    """What `headrace plan` says of the only stage."""
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train.train_config import TrainConfig
    from headrace.trainer.building.self_check import plan_model
    from headrace.trainer.planning.planned_run import GIB
    from headrace.trainer.planning.run_plan import plan_run

    loaded = load_config(TrainConfig, config, settings)
    (stage,) = plan_run(loaded, plan_model(loaded), 1).stages
    memory = stage.memory
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "masks")
    return {"predicted_gib": round(memory.peak / GIB, 2)} | {
        part: round(getattr(memory, part) / GIB, 2) for part in parts
    }


def cells(found: dict[str, object]) -> list[str]:
    """A row of the table."""
    if "error" in found:
        return ["", str(found["error"]), "", ""]
    predicted, measured = found["predicted_gib"], found.get("peak_gib")
    assert isinstance(predicted, float)
    if not isinstance(measured, float):
        return [f"{predicted:.2f}", "", "", str(found["seconds"])]
    ratio = f"{measured / predicted:.3f}"
    return [f"{predicted:.2f}", f"{measured:.2f}", ratio, str(found["seconds"])]


if __name__ == "__main__":
    sys.exit(main())
