"""Training on pictures, beside the usual way: transformers, PEFT, Liger, `torch.compile`.

    python tests/benchmarks/vision_rate.py

Qwen2.5-VL-7B's shape with random weights; rows of 4,096 tokens, each one document with two pictures
of 1,024 x 768; LoRA of rank 16 on all linear layers of the language model, tower and projector
frozen, fused AdamW, one GPU. Both sides take the same rows. Headrace reads them from shards, and
decodes the pictures while it trains; the other side is given random pixel values that lie on the
GPU already. `--tiny` runs all of it in small on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from headrace.jobs.tools import bench_train
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import TokenizerRecord
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.shards.shard_format import TRAIN, shard_file_name
from headrace.schemas.vision.processor import read_processor

sys.path.append(str(Path(__file__).parents[1] / "support"))
WARMUP = 2
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
    },
}
TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "out_hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
CONFIG = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "tie_word_embeddings": False,
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SPECIAL = {  # tokens before the end of the vocabulary
    "vision_start_token_id": 412,
    "vision_end_token_id": 411,
    "image_token_id": 409,
    "video_token_id": 408,
}
FEWER = {  # of the shape with --tiny
    "text_config": {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024},
    "vision_config": {"depth": 2, "hidden_size": 80, "out_hidden_size": 256}
    | {"intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": [1]},
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 768), help="of a picture")
    parser.add_argument("--pictures", type=int, default=2, help="of a row")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--windows", type=int, default=5, help="steps that are measured")
    parser.add_argument("--layers", type=int, help="of the language model, if not 28")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", choices=["headrace", "usual"])
    parser.add_argument("--set", action="append", default=[], help="a key of Headrace's config")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--usual-way", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.sequence, options.size, options.windows = 256, (112, 84), 2
        options.no_compile = True
    return options


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write a model directory without weights."""
    folder.mkdir(parents=True)
    fewer = FEWER if options.tiny else {"text_config": {}, "vision_config": {}}
    text = TEXT | fewer["text_config"]
    if options.layers:
        text |= {"num_hidden_layers": options.layers}
    parts = {"text_config": text, "vision_config": TOWER | fewer["vision_config"]}
    special = {name: text["vocab_size"] - place for name, place in SPECIAL.items()}
    (folder / "config.json").write_text(json.dumps(CONFIG | special | parts))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "tokenizer.json").write_text("{}")


def write_rows(folder: Path, model: Path, options: argparse.Namespace) -> None:
    """Write a shard directory through the schema and options of real ones."""
    from pictures import images_record, write_picture_shards

    from headrace.dataprep.images.families import family_rule

    own, config = read_processor(model), json.loads((model / "config.json").read_text())
    prepared = family_rule(own).prepare(photograph(*options.size))
    tiles = [encoded_tile(prepared, number, options) for number in range(options.pictures)]
    generator = np.random.default_rng(0)
    count = (WARMUP + options.windows) * options.micro_batch_size * options.micro_batches
    rows = [
        row_of(config, generator, prepared.tokens, tiles, options.sequence) for _ in range(count)
    ]
    record = images_record(own.family, own.settings, config["image_token_id"])
    manifest = write_picture_shards(folder, rows, record, sequence_len=options.sequence)
    tokenizer = TokenizerRecord(
        fingerprint=file_sha256(model / "tokenizer.json"),
        vocabulary_size=config["text_config"]["vocab_size"],
        special_tokens={},
    )
    write_manifest(folder, manifest.model_copy(update={"tokenizer": tokenizer}))


def photograph(width: int, height: int) -> Any:
    """A picture that compresses about as a photograph does."""
    from PIL import Image

    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = generator.normal(0, 1.5, smooth.shape).round().astype(int)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def encoded_tile(prepared: Any, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One entry of the column of pictures."""
    from pictures import tile

    return tile(number, prepared.tokens, prepared.tiles[0], tuple(options.size))


def row_of(
    config: dict[str, Any],
    generator: np.random.Generator,
    tokens: int,
    tiles: list[dict[str, Any]],
    length: int,
) -> dict[str, Any]:
    """A document of random tokens with pictures among them."""
    begin, placeholder, end = (
        config[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end")
    )
    ids = generator.integers(0, begin, length, dtype=np.int32)
    for number in range(len(tiles)):
        start = 16 + number * (tokens + 32)
        ids[start], ids[start + tokens + 1] = begin, end
        ids[start + 1 : start + 1 + tokens] = placeholder
    return {"input_ids": ids, "loss_mask": ids != placeholder, "images": tiles}


def measure_headrace(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own, by the training benchmark."""
    arguments = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in PASSED]
    arguments += [f"--set={setting}" for setting in options.set]
    theirs = bench_train.parse_arguments([*arguments, f"--warmup={WARMUP}"])
    config = bench_train.CONFIG.format(
        folder=folder,
        steps=WARMUP + options.windows,
        options=theirs,
        compile=str(not options.no_compile).lower(),
        adapter="lora",
        experts="",
        quantization="",
        trace="",
    )
    (folder / "train.toml").write_text(f"{config}\n[vision]\n")
    return bench_train.run_config(theirs, folder)


PASSED = ("sequence", "micro-batch-size", "micro-batches", "windows")


def measure_usual_way(folder: Path) -> dict[str, Any]:
    """Train in a process of its own, by `train_usual_way`."""
    command = [sys.executable, __file__, *sys.argv[1:], "--usual-way", str(folder)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        return {"error": f"exit code {found.returncode}"}
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def train_usual_way(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train with transformers, PEFT, Liger and `torch.compile`."""
    import torch
    from usual_way import run_steps, use_liger

    device = "cuda" if torch.cuda.is_available() else "cpu"
    liger = device == "cuda" and use_liger("qwen2_5_vl")
    model = build_usual_way(folder / "model", device, compiles=not options.no_compile)
    batches = usual_batches(folder, options, model.config.image_token_id, device)
    seconds = run_steps(model, batches, options.micro_batches, WARMUP)
    tokens = options.micro_batches * options.micro_batch_size * options.sequence
    peak = torch.cuda.max_memory_allocated() / (1 << 30) if device == "cuda" else 0.0
    return {
        "tokens_per_second": round(tokens / median(seconds)),
        "peak_gib": round(peak, 1),
        "liger": liger,
    }


def build_usual_way(directory: Path, device: str, *, compiles: bool) -> Any:
    """The model on the device, with adapters on its language model, whose layers are compiled."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(directory)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    model.config.use_cache = False
    settings = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, settings)
    for layer in model.base_model.model.model.language_model.layers if compiles else ():
        layer.compile()
    return model.train()


def usual_batches(
    folder: Path, options: argparse.Namespace, placeholder: int, device: str
) -> list[dict[str, Any]]:
    """The rows of the shards as inputs of transformers' model, on the device."""
    import torch

    config = json.loads((folder / "model" / "config.json").read_text())
    patch, merge = (config["vision_config"][k] for k in ("patch_size", "spatial_merge_size"))
    width, height = (round(side / (patch * merge)) * merge for side in options.size)
    count = options.pictures * options.micro_batch_size
    width_of_patch = 3 * config["vision_config"]["temporal_patch_size"] * patch**2
    pictures = {
        "pixel_values": torch.randn(count * width * height, width_of_patch, device=device),
        "image_grid_thw": torch.tensor([[1, height, width]] * count, device=device),
    }
    table = pq.read_table(folder / "shards" / shard_file_name(TRAIN, 0))
    ids = torch.tensor(np.array(table["input_ids"].to_pylist()), device=device).long()
    return [
        {"input_ids": part, "labels": part.masked_fill(part == placeholder, -100), **pictures}
        | {"mm_token_type_ids": (part == placeholder).int()}
        for part in ids.split(options.micro_batch_size)
    ]


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':10} {'tokens/s':>9} {'peak GiB':>9} {'data wait':>10}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:10} {row['error']}")
            continue
        wait = f"{max(row['data_share']):.2%}" if "data_share" in row else "none"
        print(f"{name:10} {row['tokens_per_second']:>9,} {row['peak_gib']:>9} {wait:>10}")
    rates = [row["tokens_per_second"] for row in rows.values() if "error" not in row]
    if len(rates) == 2:
        print(f"ratio {rates[0] / rates[1]:.2f}")


def main() -> None:
    """Measure both sides, and print the table."""
    options = parse_arguments()
    if options.usual_way is not None:
        print(json.dumps(train_usual_way(options.usual_way, options)), flush=True)
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, begun = Path(scratch), time.perf_counter()
        write_model(folder / "model", options)
        write_rows(folder / "shards", folder / "model", options)
        if options.only != "usual":
            rows["headrace"] = measure_headrace(folder, options)
            print(json.dumps(rows["headrace"]), flush=True)
        if options.only != "headrace":
            rows["usual way"] = measure_usual_way(folder)
            print(json.dumps(rows["usual way"]), flush=True)
        print(f"{time.perf_counter() - begun:.0f} s in all")
    show(rows)


if __name__ == "__main__":
    main()
