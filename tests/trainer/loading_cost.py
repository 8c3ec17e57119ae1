"""Builds each stage of a model in turn, and prints bytes read and the peak of memory."""

import gc
import json
import sys
from pathlib import Path

import torch
from tiny_families import CPU, config_of, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.trainer.model.model_builder import build_stage

CLEAR_PEAK = "5"  # proc(5), clear_refs


def status(name):
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def save_model(directory):
    """A Llama of 280 MB in bfloat16."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    largest = sum(p.nbytes for p in model.model.layers[0].parameters())
    model.save_pretrained(directory)
    return largest


def main(directory, stages):
    build_stage(config_of(save_tiny("llama", directory / "warm-up")), 0, CPU)  # imports and caches
    largest = save_model(directory)
    config = config_of(directory, stages, {"kind": "lora", "rank": 2}, dtype="bfloat16")
    costs = []
    for stage in range(stages):
        gc.collect()
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        before, read = status("VmRSS"), bytes_read()
        built = build_stage(config, stage, CPU)
        costs.append(
            {
                "read": bytes_read() - read,
                "peak": status("VmHWM") - before,
                "stage_bytes": sum(p.nbytes for p in built.stage.parameters()),
                "largest_layer": largest,
                "file_bytes": (directory / "model.safetensors").stat().st_size,
            }
        )
        del built
    sys.stdout.write(json.dumps(costs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
