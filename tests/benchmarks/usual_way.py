"""What one would use instead, beside `bench_train`: transformers, PEFT, Liger and `torch.compile`.

    python tests/benchmarks/usual_way.py --preset gemma3-12b --layers 12

Random weights and tokens, LoRA of rank 16 on all linear layers, fused AdamW, one GPU. Prints a JSON
line with tokens/s of the median step and the peak of memory. Liger is used where it is installed
and knows the model.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.jobs.tools.bench_shapes import PRESETS, shape_of
from headrace.jobs.tools.bench_train import matmul_rate

WARMUP = 2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--attention", default="sdpa", help="or flex_attention, eager")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def use_liger(model_type: str) -> bool:
    """Patch transformers by Liger's kernels; returns whether there are any for this model."""
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError:
        return False
    name = f"apply_liger_kernel_to_{model_type.removesuffix('_text')}"
    patch: Callable[[], None] | None = getattr(liger, name, None)
    if patch is not None:
        patch()
    return patch is not None


def build(options: argparse.Namespace) -> Any:
    """The model on the GPU, with adapters, its layers compiled."""
    shape = shape_of(options.preset, options.layers)
    shape.pop("architectures")
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=options.attention, dtype=torch.bfloat16
        )
    model.config.use_cache = False
    settings = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for layer in () if options.no_compile else model.base_model.model.model.layers:
        layer.compile()
    return model.train()


def run_step(
    model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]
) -> None:
    """One step of training on the inputs of its micro-batches."""
    for inputs in batches:
        (model(**inputs).loss / len(batches)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_steps(
    model: Any, batches: list[dict[str, Tensor]], micro_batches: int, warmup: int
) -> list[float]:
    """Train on all inputs; returns the seconds of each step after the first ones."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    seconds = []
    for start in range(0, len(batches), micro_batches):
        wait_for_device()
        begun = time.perf_counter()
        run_step(model, optimizer, batches[start : start + micro_batches])
        wait_for_device()
        seconds.append(time.perf_counter() - begun)
    return seconds[warmup:]


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure, and print the line."""
    options = parse_arguments()
    liger = use_liger(PRESETS[options.preset]["model_type"])
    model = build(options)
    size = (options.micro_batch_size, options.sequence)
    count = (WARMUP + options.windows) * options.micro_batches
    vocabulary = PRESETS[options.preset]["vocab_size"]
    drawn = [torch.randint(0, vocabulary, size, device="cuda") for _ in range(count)]
    batches = [{"input_ids": ids, "labels": ids} for ids in drawn]
    seconds = run_steps(model, batches, options.micro_batches, WARMUP)
    tokens = options.micro_batches * size[0] * size[1]
    line = vars(options) | {
        "liger": liger,
        "tokens_per_second": round(tokens / median(seconds)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 1),
    }
    print(json.dumps(line | matmul_rate()), flush=True)


if __name__ == "__main__":
    main()
