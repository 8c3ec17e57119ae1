"""Is training in 8-bit floats safe? Evaluation losses and gradients of the real small model.

    python tests/benchmarks/fp8_parity.py --model models/smollm2-135m --shards SHARDS

LoRA over bfloat16, FP8 and NF4 weights, the last with both kinds of products, for 300 steps of real
text; then the gradient of each layer's adapters at the first step against float32. Prints a JSON
line for each; `--picture FILE` draws the evaluation losses. The shards need an evaluation split.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from built_stages import build_stage
from torch import Tensor
from torch.nn.functional import cosine_similarity

from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.stage.micro_batch import MicroBatch

NF4 = 'quantization={backend="bnb",double_quantization=true}'
VARIANTS = {  # name -> overrides of the config
    "bfloat16": [],
    "FP8": ['quantization={backend="fp8"}'],
    "FP8, keys and values in bfloat16": [
        'quantization={backend="fp8",skip_modules=["lm_head","k_proj","v_proj"]}'
    ],
    "FP8, head too": ['quantization={backend="fp8",skip_modules=[]}'],
    "NF4": [NF4],
    "NF4, FP8 products": [NF4.replace("}", ',matmul="fp8"}')],
}
REFERENCE = {name: "bfloat16" for name in VARIANTS if name.startswith("FP8")}
REFERENCE["NF4, FP8 products"] = "NF4"
ROWS, EVALUATIONS = 16, 6
LAYER = re.compile(r"\.layers\.(\d+)\.")
CONFIG = """\
model = "{model}"
output_dir = "unused"
dtype = "bfloat16"
max_steps = {steps}
micro_batch_size = 8
gradient_accumulation_steps = 2
datasets = [{{ path = "{shards}" }}]
evaluation_datasets = [{{ path = "{shards}", name = "text", max_rows = 256 }}]
evaluation = {{ every_steps = {every} }}
adapter = {{ kind = "lora", rank = 16 }}
optimizer = {{ lr = 1e-3 }}
scheduler = {{ type = "cosine", warmup_steps = 10 }}
checkpoint = {{ at_end = false }}
"""


def evaluation_losses(config: Path, name: str, overrides: list[str]) -> dict[int, float]:
    """Evaluation losses of a run by step."""
    run = config.parent / re.sub(r"\W+", "-", name)
    command = [sys.executable, "-m", "headrace.jobs.cli", "train", str(config)]
    command += ["--gpus", "1"]
    for override in (f'output_dir="{run}"', *overrides):
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}


def first_rows(shards: Path) -> list[list[int]]:
    """The ids of the first full rows of a shard directory."""
    path = min(shards.glob("shard-*.parquet"))
    ids: list[list[int]] = pq.read_table(path, columns=["input_ids"])["input_ids"].to_pylist()
    full = max(map(len, ids))
    return [row for row in ids if len(row) == full][:ROWS]


def gradients(
    config: TrainConfig, rows: list[list[int]], device: torch.device
) -> dict[int, Tensor]:
    """The gradient of each layer's adapters over some rows of one length, flat, float32."""
    built = build_stage(config, 0, device)
    stage, length = built.stage.train(), len(rows[0])
    generator = torch.Generator().manual_seed(0)
    found: dict[int, list[Tensor]] = {}
    parameters = [(name, p) for name, p in stage.canonical_parameters().items() if p.requires_grad]
    for _, parameter in parameters:  # B starts at zero, which would hide A's gradient
        value = torch.randn(parameter.shape, generator=generator) / 100
        parameter.data.add_(value.to(parameter))
    if stage.before_step is not None:
        stage.before_step()
    ids = torch.tensor(rows, device=device)
    batch = MicroBatch(
        [[length]] * len(rows), [length] * len(rows), ids.roll(-1, 1), 1 / ids.numel(), 0.0, seed=0
    )
    stage(ids, batch).value.backward()
    for name, parameter in parameters:
        match = LAYER.search(name)
        assert match is not None and parameter.grad is not None
        found.setdefault(int(match[1]), []).append(parameter.grad.float().flatten())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def draw(losses: dict[str, dict[int, float]], picture: Path) -> None:
    """Evaluation losses by step, a line for each variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    for name, values in losses.items():
        axes.plot(list(values), list(values.values()), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="evaluation loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "train.toml"
        values = {"model": options.model.resolve(), "shards": options.shards.resolve()}
        every = max(1, options.steps // EVALUATIONS)
        path.write_text(CONFIG.format(**values, steps=options.steps, every=every))
        rows = first_rows(options.shards)
        exact = gradients(load_config(TrainConfig, path, ['dtype="float32"']), rows, device)
        for name, overrides in VARIANTS.items():
            near = gradients(load_config(TrainConfig, path, overrides), rows, device)
            cosines = [cosine_similarity(near[layer], exact[layer], 0).item() for layer in exact]
            losses[name] = evaluation_losses(path, name, overrides)
            last = list(losses[name].values())[-1]
            line: dict[str, object] = {"variant": name, "loss": round(last, 5)}
            if name in REFERENCE:
                reference = list(losses[REFERENCE[name]].values())[-1]
                line["of_its_reference"] = round(last / reference - 1, 5)
            line["least_cosine"] = round(min(cosines), 5)
            print(json.dumps(line), flush=True)
    if options.picture:
        draw(losses, options.picture)


if __name__ == "__main__":
    main()
