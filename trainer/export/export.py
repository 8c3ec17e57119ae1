"""Writes what was trained as others read it: PEFT's adapter, or a Hugging Face model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.publish import remove_tree, rename_durably
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.export.control_file import TENSORS_NAME, write_record
from headrace.trainer.model.adapters import as_plain_lora, exported_tensors
from headrace.trainer.model.materializer import find_slots
from headrace.trainer.model.model_builder import BuiltStage
from headrace.trainer.model.model_files import (
    ModelWriter,
    copy_model_files,
    file_count,
    part_name,
    write_index,
)


def export(built: BuiltStage, layout: Layout, model: Path, run_directory: Path) -> Path:
    """Write `adapter/` (LoRA) or `model/` (full fine-tuning); every rank takes part.

    Args:
        model: directory of the base model.

    Returns:
        The directory, published whole.
    """
    adapters = built.lora_config is not None or built.control is not None
    final = run_directory / ("adapter" if adapters else "model")
    temporary = run_directory / f".{final.name}.tmp"
    if layout.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(layout.world_group)
    if adapters:
        if layout.replica == 0:
            save_adapter_part(built, temporary, layout.stage, layout.stages)
        dist.barrier(layout.world_group)
        if layout.rank == 0 and built.control is not None:
            finish_control(temporary, layout.stages, built.control, model)
        elif layout.rank == 0:
            assert built.lora_config is not None
            finish_adapter(temporary, layout.stages, built.lora_config, bool(built.initial))
    else:
        counts = gather_objects(file_count(model_parts(built)), layout.world_group)
        before, total = sum(counts[: layout.stage]), sum(counts[: layout.stages])
        written: dict[str, dict[str, int]] = {}
        if layout.replica == 0:
            written = save_model_part(built, temporary, before, total)
        files = gather_objects(written, layout.world_group)
        if layout.rank == 0:
            finish_model(temporary, files, model, built)
    if layout.rank == 0:
        if final.exists():
            remove_tree(final)
        rename_durably(temporary, final)
    dist.barrier(layout.world_group)
    return final


def save_adapter_part(built: BuiltStage, directory: Path, stage: int, stages: int) -> None:
    """One stage's share of an adapter, under PEFT's names, in float32."""
    values = {item.name: item.parameter.detach().cpu() for item in built.trained}
    tensors = exported_tensors(values, built.initial)
    save_file(tensors, directory / part_name(stage, stages), metadata={"format": "pt"})


def finish_adapter(directory: Path, stages: int, config: LoraConfig, took_over: bool) -> None:
    """One file with its config, as PEFT expects.

    Args:
        took_over: whether the adapters started from a part of the frozen weights.
    """
    join_parts(directory, stages, "adapter_model.safetensors")
    config = as_plain_lora(config) if took_over else config
    config.inference_mode = True
    config.save_pretrained(str(directory))


def finish_control(directory: Path, stages: int, config: AdapterConfig, model: Path) -> None:
    """One file of control adapters, and what they were made by."""
    join_parts(directory, stages, TENSORS_NAME)
    write_record(directory, config, str(model))


def join_parts(directory: Path, stages: int, name: str) -> None:
    """One file of the tensors of all stages."""
    tensors: dict[str, Tensor] = {}
    for stage in range(stages):
        part = directory / part_name(stage, stages)
        tensors |= load_file(part)
        part.unlink()
    save_file(tensors, directory / name, metadata={"format": "pt"})


def model_parts(built: BuiltStage) -> list[int]:
    """Bytes of each module of a stage, as they will be stored; a tied head is not."""
    size = stored_dtype(built).itemsize
    return [
        sum(slot.empty.numel() * size for slot in find_slots({name: module}))
        for name, module in built.stage.names.items()
        if not is_tied_head(built, name)
    ]


def save_model_part(
    built: BuiltStage, directory: Path, before: int, total: int
) -> dict[str, dict[str, int]]:
    """One stage's weights, trained or not, in files of limited size; one module at a time.

    Args:
        before: files of the stages before this one; total: files of all stages.

    Returns:
        File name -> tensor name -> bytes.
    """
    dtype = stored_dtype(built)
    writer = ModelWriter(directory, built.skeleton, before, total)
    for size, (name, module) in zip(
        model_parts(built),
        ((n, m) for n, m in built.stage.names.items() if not is_tied_head(built, n)),
        strict=True,
    ):
        writer.add(
            {
                f"{name}.{key}": parameter.detach().to("cpu", dtype).contiguous()
                for key, parameter in module.named_parameters()
            },
            size,
        )
    return writer.finish()


def finish_model(
    directory: Path, files: Sequence[Mapping[str, dict[str, int]]], model: Path, built: BuiltStage
) -> None:
    """The index over the stages' files, config and tokenizer, as transformers expects."""
    write_index(directory, {name: sizes for part in files for name, sizes in part.items()})
    copy_model_files(model, directory, built.skeleton)


def stored_dtype(built: BuiltStage) -> torch.dtype:
    """The base model's type."""
    return getattr(built.model_config, "dtype", None) or torch.float32


def is_tied_head(built: BuiltStage, name: str) -> bool:
    """Whether a module is a head that the embedding's file entry stands for."""
    return built.architecture.tied and name == built.architecture.family.head
