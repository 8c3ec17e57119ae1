"""Builds each stage of a model in turn, and prints bytes read and the peak of memory: of weights
as they are stored, of quantized ones, and of those of files that are quantized.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from built_stages import build_stage
from packed_models import fp8_blocks, mxfp4, repack
from tiny_families import CPU, config_of, save_tiny
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from headrace.trainer.architecture import weights
from headrace.trainer.building.partition import partition
from headrace.trainer.building.self_check import plan_model

CLEAR_PEAK = "5"  # proc(5), clear_refs
AHEAD_BYTES = 8 << 20  # as small a share of this model as the usual number is of a large one


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


def save_mixture(directory):
    """A model of gpt_oss's kind of 300 MB in bfloat16, nearly all of it experts."""
    config = GptOssConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_local_experts=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = GptOssForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    largest = sum(p.nbytes for p in model.model.layers[0].parameters())
    model.save_pretrained(directory)
    return largest


def save_packed(directory):
    """Models whose files are quantized: name -> directory, bytes of the largest layer."""
    sizes = {"fp8": save_model(directory / "plain"), "mxfp4": save_mixture(directory / "mixture")}
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    repack(directory / "plain", directory / "fp8", fp8_blocks([128, 128]), fp8)
    repack(directory / "mixture", directory / "mxfp4", mxfp4, {"quant_method": "mxfp4"})
    return {name: (directory / name, size) for name, size in sizes.items()}


def measure_packed(directory, stages):
    """Costs of models whose files are quantized, held in bfloat16, and in 4 bits."""
    adapter, costs = {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]}, {}
    for name, (model, largest) in save_packed(directory).items():
        for backend in (None, {"backend": "bnb"})[: 2 if name == "fp8" else 1]:
            settings = {"quantization": backend, "dtype": "bfloat16"}
            config = config_of(model, stages, adapter, **settings)
            build_stage(config, 0, CPU)  # imports and caches
            key = name + (" in 4 bits" if backend else "")
            costs[key] = list(measure(config, model, largest))
    sys.stdout.write(json.dumps(costs))


def main(directory, stages, backends):
    weights.AHEAD_BYTES = AHEAD_BYTES
    if backends == ["packed"]:
        measure_packed(directory, stages)
        return
    largest = save_model(directory)
    tiny, adapter = save_tiny("llama", directory / "warm-up"), {"kind": "lora", "rank": 2}
    costs = {}
    for backend in ["none", *backends]:
        settings = {"quantization": None if backend == "none" else {"backend": backend}}
        build_stage(config_of(tiny, 1, adapter, **settings), 0, CPU)  # imports and caches
        config = config_of(directory, stages, adapter, dtype="bfloat16", **settings)
        costs[backend] = list(measure(config, directory, largest))
    sys.stdout.write(json.dumps(costs))


def measure(config, directory, largest):
    for stage in range(config.pipeline_stages):
        gc.collect()
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        before, read = status("VmRSS"), bytes_read()
        built = build_stage(config, stage, CPU)
        held = [*built.stage.parameters(), *built.stage.buffers()]
        yield {
            "read": bytes_read() - read,
            "peak": status("VmHWM") - before,
            "stage_bytes": sum(tensor.nbytes for tensor in held),
            "share_bytes": 2 * sum(part.weights - part.trained for part in parts(config, stage)),
            "largest_layer": largest,
            "file_bytes": (directory / "model.safetensors").stat().st_size,
        }
        del built, held


def parts(config, stage):
    size = plan_model(config).size
    return size.parts(partition(config, size)[stage], stage, config.pipeline_stages)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
