"""Writes what was trained as others read it: PEFT's adapter, or a Hugging Face model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headrace.schemas.publish import remove_tree, rename_durably, write_atomic
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.model_builder import BuiltStage
from headrace.trainer.weight_index import INDEX_NAME

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def export(built: BuiltStage, layout: Layout, model: Path, run_directory: Path) -> Path:
    """Write `adapter/` (LoRA) or `model/` (full fine-tuning); every rank takes part.

    Returns:
        The directory, published whole.
    """
    final = run_directory / ("adapter" if built.lora_config is not None else "model")
    temporary = run_directory / f".{final.name}.tmp"
    if layout.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(layout.world_group)
    part, sizes = part_name(layout.stage, layout.stages), {}
    if layout.replica == 0:
        tensors = stage_tensors(built)
        save_file(tensors, temporary / part, metadata={"format": "pt"})
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    parts = dict(gather_objects((part, sizes), layout.world_group)[: layout.stages])
    if layout.rank == 0:
        if built.lora_config is not None:
            finish_adapter(temporary, [temporary / name for name in parts])
            built.lora_config.inference_mode = True
            built.lora_config.save_pretrained(str(temporary))
        else:
            finish_model(temporary, parts, model)
        if final.exists():
            remove_tree(final)
        rename_durably(temporary, final)
    dist.barrier(layout.world_group)
    return final


def part_name(stage: int, stages: int) -> str:
    return f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def stage_tensors(built: BuiltStage) -> dict[str, Tensor]:
    """This stage's share: PEFT names in float32, or model names in the type of the base model."""
    if built.lora_config is not None:
        return {
            item.name.replace(".default.", "."): item.parameter.detach().cpu().contiguous()
            for item in built.trained
        }
    dtype = getattr(built.model_config, "dtype", None) or torch.float32
    owned: Sequence[tuple[str, nn.Parameter]] = [
        (p.name, p.parameter) for p in built.trained if p.owned
    ]
    return {name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in owned}


def finish_adapter(directory: Path, parts: Sequence[Path]) -> None:
    """One file, as PEFT expects."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= load_file(part)
        part.unlink()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def finish_model(directory: Path, parts: dict[str, dict[str, int]], model: Path) -> None:
    """The index over the stages' files, config and tokenizer, as transformers expects.

    Args:
        parts: file name -> tensor name -> bytes.
    """
    weight_map = {name: part for part, sizes in parts.items() for name in sizes}
    size = sum(sum(sizes.values()) for sizes in parts.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomic(directory / INDEX_NAME, json.dumps(index, indent=1) + "\n")
    for name in MODEL_FILES:
        if (model / name).is_file():
            shutil.copy2(model / name, directory / name)
