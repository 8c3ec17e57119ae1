"""`headrace train` at 1 and 2 stages against a plain transformers + PEFT loop: LoRA, same rows.

The plain loop is this file again as `layouts.py CONFIG`, in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loader_rate import loader_alone
from peft import get_peft_model
from report import MODEL, print_table, text_config
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headrace.dataprep.prepare import prepare
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.targets import lora_config
from headrace.trainer.batches.batch import Batch
from headrace.trainer.devices import compute_dtype
from headrace.trainer.layers.device import position_ids
from headrace.trainer.optim.optimizer import learning_rate, set_learning_rate
from headrace.trainer.run.step_report import memory_gib

GPUS = torch.cuda.device_count()
ROW, MICRO_BATCHES, STEPS = (2048, 16, 20) if GPUS else (256, 8, 4)
CONFIG = """
model = "{model}"
output_dir = "{folder}/unused"
max_steps = {steps}
gradient_accumulation_steps = {micro_batches}
datasets = [{{ path = "{folder}/shards" }}]
optimizer = {{ lr = 1e-4 }}
checkpoint = {{ every_minutes = 600 }}
"""

Steps = list[dict[str, float]]


def write_inputs(folder: Path) -> Path:
    """Shards of real text, and a config over them."""
    prepare(text_config(folder / "shards", sequence_len=ROW), workers=1)
    config = folder / "train.toml"
    config.write_text(
        CONFIG.format(model=MODEL, folder=folder, steps=STEPS, micro_batches=MICRO_BATCHES)
    )
    return config


def train(config: Path, stages: int) -> Steps:
    """The metrics of each step of a run through the command."""
    run = config.parent / f"{stages}-stages"
    command = [sys.executable, "-m", "headrace.jobs.cli", "train", str(config)]
    command += ["--gpus", str(stages), "--set", f"pipeline_stages={stages}"]
    subprocess.run([*command, "--set", f'output_dir="{run}"'], check=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain(config: Path) -> Steps:
    """The same of the plain loop."""
    command = [sys.executable, __file__, str(config)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def run_plain(path: Path) -> None:
    """Train as a short script would, in the same types, and print a line a step."""
    config = load_config(TrainConfig, path, [])
    device = torch.device("cuda" if GPUS else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=compute_dtype(config.dtype, device)
    )
    layers = model.config.num_hidden_layers
    adapter = lora_config(config.adapter, model, config.model, layers, dora=False)
    model = get_peft_model(model, adapter).to(device).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.optimizer.lr, fused=True)
    loader = loader_alone(config, device)
    for step in range(STEPS):
        started = time.perf_counter()
        batch = next(loader)
        rate = learning_rate(config.optimizer, config.scheduler, step, STEPS)
        set_learning_rate(optimizer, rate)
        loss = accumulate(model, batch, device)
        torch.nn.utils.clip_grad_norm_(weights, config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        line = {"loss": loss, "seconds": seconds, "tokens": batch.tokens}
        sys.stdout.write(json.dumps(line | {"memory_gib": memory_gib()}) + "\n")


def accumulate(model: Any, batch: Batch, device: torch.device) -> float:
    """Gradients of one global batch; positions that restart tell transformers the documents."""
    losses = []
    for ids, labels, lengths in zip(
        batch.input_ids, batch.labels, batch.document_lengths, strict=True
    ):
        positions = position_ids(lengths).to(device)
        logits = model(
            input_ids=ids.to(device).long(), position_ids=positions, use_cache=False
        ).logits
        targets = labels.to(device).flatten().long()
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
        loss = loss / batch.trained_tokens
        loss.backward()
        losses.append(loss.detach())
    return float(sum(losses))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = write_inputs(Path(folder))
        runs = {"transformers + PEFT": plain(config), "headrace, 1 stage": train(config, 1)}
        if GPUS != 1:
            runs["headrace, 2 stages"] = train(config, 2)
    rows = []
    times = {name: median([step["seconds"] for step in run[1:]]) for name, run in runs.items()}
    for name, run in runs.items():
        rate = run[-1]["tokens"] / times[name]
        ratio = times["transformers + PEFT"] / times[name]
        memory = run[-1]["memory_gib"]
        rows.append((name, f"{run[0]['loss']:.5f}", f"{times[name]:.2f}", f"{rate:,.0f}",
                     f"{ratio:.2f}", f"{memory:.2f}"))  # fmt: skip
    device = torch.cuda.get_device_name() if GPUS else f"{len(os.sched_getaffinity(0))} CPU cores"
    print_table(
        f"LoRA on {MODEL.name}, {device}, steps of {MICRO_BATCHES} rows of {ROW} tokens, "
        f"median of {STEPS - 1} after the first",
        ("", "first loss", "s/step", "tokens/s", "of plain's rate", "GiB, largest process"),
        rows,
    )


if __name__ == "__main__":
    run_plain(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
