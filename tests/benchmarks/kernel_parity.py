"""The loss over 100 steps with kernels on against their plain twins, on a GPU: figures and a plot.

A Llama of 47 million weights learns the standard library's sources from scratch: in bfloat16 with
kernels, in bfloat16 with their twins, and in float32 with the twins, which shows how large the
noise of bfloat16 is. Prints a JSON line for LoRA and one for full fine-tuning; `--picture FILE`
draws the curves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import STDLIB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig

STEPS, ROW = 100, 1024
VARIANTS = {
    "kernels": {"kernels": "auto", "dtype": "bfloat16"},
    "twins": {"kernels": "torch", "dtype": "bfloat16"},
    "float32": {"kernels": "torch", "dtype": "float32"},
}
CONFIG = """
model = "{folder}/model"
output_dir = "unused"
max_steps = {steps}
micro_batch_size = 4
gradient_accumulation_steps = 2
datasets = [{{ path = "{folder}/shards" }}]
adapter = {{ kind = "lora", rank = 16 }}
optimizer = {{ lr = 1e-3 }}
scheduler = {{ type = "cosine", warmup_steps = 10 }}
checkpoint = {{ at_end = false }}
"""


def write_inputs(folder: Path) -> Path:
    """A model with random weights, a tokenizer and shards of real text, and a config over them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=ROW,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(STDLIB.glob("[a-d]*.py"))], trainer)
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    names = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    settings = {
        "output": str(folder / "shards"),
        "tokenizer": str(folder / "model"),
        "sequence_len": ROW,
        "max_reject_fraction": 1.0,
        "sources": [{"name": "stdlib", "type": "text", "path": str(STDLIB / "*.py")}],
    }
    prepare(PrepareConfig.model_validate(settings), workers=1)
    path = folder / "train.toml"
    path.write_text(CONFIG.format(folder=folder, steps=STEPS))
    return path


def losses(config: Path, name: str, settings: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    run = config.parent / name
    command = [
        sys.executable,
        "-m",
        "headrace.jobs.cli",
        "train",
        str(config),
        "--gpus",
        "1",
    ]
    for key, value in {"output_dir": str(run), **settings}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def largest(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


def draw(curves: dict[str, dict[str, list[float]]], picture: Path) -> None:
    """Losses above, their difference from float32 below; a column for each mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(9, 4.5), dpi=130, sharex=True, squeeze=False, layout="constrained"
    )
    for column, (mode, runs) in enumerate(curves.items()):
        top, bottom = axes[0][column], axes[1][column]
        for name, values in runs.items():
            top.plot(values, label=name, linewidth=1.2)
            if name != "float32":
                exact = runs["float32"]
                bottom.plot([100 * (x / y - 1) for x, y in zip(values, exact, strict=True)])
        top.set(title=mode, ylabel="loss (nats per token)")
        bottom.set(xlabel="step", ylabel="% from float32")
        top.legend(frameon=False)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: kernels and twins are the same there")
        return
    curves: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = write_inputs(Path(scratch))
        for mode, kind in (("LoRA", "lora"), ("full", "none")):
            curves[mode] = {
                name: losses(config, f"{mode}-{name}", {**settings, "adapter.kind": kind})
                for name, settings in VARIANTS.items()
            }
            runs = curves[mode]
            line = {
                "mode": mode,
                "first": runs["kernels"][0],
                "last": runs["kernels"][-1],
                "kernels_from_twins": largest(runs["kernels"], runs["twins"]),
                "kernels_from_float32": largest(runs["kernels"], runs["float32"]),
                "twins_from_float32": largest(runs["twins"], runs["float32"]),
            }
            print(json.dumps(line), flush=True)
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
