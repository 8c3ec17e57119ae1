"""Writes what was trained as others read it: PEFT's adapter, or a Hugging Face model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.publish import remove_tree, rename_durably
from headrace.trainer.distributed import Layout, gather_at_first, gather_objects
from headrace.trainer.export.control_file import TENSORS_NAME, write_record
from headrace.trainer.export.model_card import write_card
from headrace.trainer.model.adapters import as_plain_lora, exported_tensors, side_by_side
from headrace.trainer.model.materializer import find_slots
from headrace.trainer.model.model_builder import BuiltStage
from headrace.trainer.model.model_files import (
    ModelWriter,
    copy_model_files,
    file_count,
    write_index,
)


def export(
    built: BuiltStage,
    layout: Layout,
    model: Path,
    run_directory: Path,
    step: int,
    *,
    node_local: bool = False,
) -> Path:
    """Write `adapter/` (LoRA) or `model/` (full fine-tuning); every rank takes part.

    Args:
        model: directory of the base model.
        step: how many were trained.
        node_local: the run directory is another one on each machine. The first one's gets the whole
            adapter; of a model, each machine keeps the files of its stages, the first the index.

    Returns:
        The directory, published whole.
    """
    adapters = built.lora_config is not None or built.control is not None
    final = run_directory / ("adapter" if adapters else "model")
    temporary = run_directory / f".{final.name}.tmp"
    publishes = layout.publishes(node_local=node_local and not adapters)
    if publishes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(layout.world_group)
    if adapters:
        parts = gather_at_first(adapter_tensors(built) if layout.replica == 0 else {}, layout)
        tensors = {name: value for part in parts for name, value in part.items()}
        width = max(gather_objects(built.width, layout.world_group))
        if layout.rank == 0 and built.control is not None:
            finish_control(temporary, tensors, built.control, model)
        elif layout.rank == 0:
            assert built.lora_config is not None
            finish_adapter(temporary, tensors, built.lora_config, width)
    else:
        by_rank = gather_objects(file_count(model_parts(built)), layout.world_group)
        counts = [by_rank[layout.rank_of(stage)] for stage in range(layout.stages)]
        written: dict[str, dict[str, int]] = {}
        if layout.keeps_files(node_local=node_local):
            before = sum(counts[: layout.stage])
            written = save_model_part(built, temporary, before, sum(counts))
        files = gather_objects(written, layout.world_group)
        if layout.rank == 0:
            finish_model(temporary, files, model, built)
    if layout.rank == 0:
        write_card(temporary, run_directory, step)
    dist.barrier(layout.world_group)
    if publishes:
        if final.exists():
            remove_tree(final)
        rename_durably(temporary, final)
    dist.barrier(layout.world_group)
    return final


def adapter_tensors(built: BuiltStage) -> dict[str, Tensor]:
    """One stage's share of an adapter, under PEFT's names, in float32."""
    values = {item.name: item.parameter.detach().cpu() for item in built.trained}
    return exported_tensors(side_by_side(values, built.merged), built.initial)


def finish_adapter(
    directory: Path, tensors: dict[str, Tensor], config: LoraConfig, width: int
) -> None:
    """One file with its config, as PEFT expects.

    Args:
        width: how many times as wide as the trained adapters they are written.
    """
    save_tensors(directory / "adapter_model.safetensors", tensors)
    config = as_plain_lora(config, width)
    config.inference_mode = True
    config.save_pretrained(str(directory))


def finish_control(
    directory: Path, tensors: dict[str, Tensor], config: AdapterConfig, model: Path | str
) -> None:
    """One file of control adapters, and what they were made by."""
    save_tensors(directory / TENSORS_NAME, tensors)
    write_record(directory, config, str(model))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """As PEFT writes them."""
    save_file(tensors, path, metadata={"format": "pt"})


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
