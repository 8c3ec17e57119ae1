"""How much of a backward pass is gradients of weights, which a zero-bubble schedule would put off:
layers of a Llama, frozen, with LoRA, and trained in full. On a GPU of an 8B's shape, else small.
"""

import time
from statistics import median

import torch
from peft import LoraConfig, inject_adapter_in_model
from report import print_table
from torch import nn
from transformers import LlamaConfig, LlamaModel

from headrace.jobs.tools.bench_shapes import shape_of
from headrace.trainer import devices

LAYERS, REPEATS = 4, 5
KINDS = ("frozen", "LoRA", "full")


def build(kind: str, device: torch.device) -> nn.Module:
    """Layers without an embedding's gradient."""
    on_gpu = devices.is_accelerator(device)
    shape = shape_of("llama-8b", LAYERS) | {"vocab_size": 16, "attn_implementation": "sdpa"}
    if not on_gpu:
        shape |= {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with device:
        model = LlamaModel(LlamaConfig(**shape)).to(dtype).requires_grad_(kind == "full")
        if kind == "LoRA":
            config = LoraConfig(r=16, target_modules="all-linear")
            inject_adapter_in_model(config, model)
    return model.to(dtype)


def seconds(model: nn.Module, tokens: int, device: torch.device) -> tuple[float, float]:
    """Medians of the forward pass and the backward pass."""
    layer = next(model.parameters())
    inputs = torch.randn(1, tokens, model.config.hidden_size, device=device, dtype=layer.dtype)
    forward, backward = [], []
    for _ in range(REPEATS + 1):
        inputs = inputs.detach().requires_grad_()
        started = measure(device)
        output = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        between = measure(device)
        output.backward(torch.ones_like(output))
        ended = measure(device)
        forward.append(between - started)
        backward.append(ended - between)
        model.zero_grad()
    return median(forward[1:]), median(backward[1:])


def measure(device: torch.device) -> float:
    """Return seconds; on CPU those of the processor, which others may share."""
    devices.synchronize(device)
    return time.perf_counter() if devices.is_accelerator(device) else time.process_time()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device(devices.device_type())
    tokens = 8192 if devices.is_accelerator(device) else 512
    found = {}
    for kind in KINDS:
        found[kind] = seconds(build(kind, device), tokens, device)
        devices.free_unused(device)
    frozen = found["frozen"][1]
    rows = [
        [
            kind,
            f"{forward * 1e3:.1f}",
            f"{backward * 1e3:.1f}",
            f"{max(0, 1 - frozen / backward):.0%}",
        ]
        for kind, (forward, backward) in found.items()
    ]
    columns = ["", "forward, ms", "backward, ms", "of it for weights"]
    print_table(f"{LAYERS} layers, {tokens} tokens, {devices.device_name()}", columns, rows)


if __name__ == "__main__":
    main()
