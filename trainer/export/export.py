"""Writes what was trained as others read it: PEFT's adapter, or a Hugging Face model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.schemas.publish import remove_tree, rename_durably
from headrace.trainer.architecture.model_writer import (
    ModelWriter,
    as_saved,
    copy_model_files,
    file_count,
    write_index,
    write_tokenizer,
)
from headrace.trainer.architecture.weight_index import has_weights
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.directory_weights import StoredWeights
from headrace.trainer.building.parameter_slots import find_slots, stored_buffers
from headrace.trainer.building.weight_source import grown
from headrace.trainer.export.model_card import write_card
from headrace.trainer.messages import gather, gather_at_first
from headrace.trainer.parallel import RankLayout
from headrace.trainer.quantized.modules import quantized_places, quantized_weights_of


def export(
    built: BuiltStage,
    layout: RankLayout,
    model: Path,
    run_directory: Path,
    step: int,
    *,
    node_local: bool = False,
    save_dtype: str = "auto",
) -> Path:
    """Write `adapter/` (LoRA) or `model/` (full fine-tuning); every rank takes part.

    Args:
        model: directory of the base model.
        step: how many were trained.
        node_local: the run directory is another one on each machine. The first one's gets the whole
            adapter; of a model, each machine keeps the files of its stages, the first the index.
        save_dtype: torch's name of a type, or "auto": float32 for adapters, else the base model's.

    Returns:
        The directory, published whole.
    """
    adapters = not built.method.trains_base
    final = run_directory / ("adapter" if adapters else "model")
    temporary = run_directory / f".{final.name}.tmp"
    publishes = layout.publishes(node_local=node_local and not adapters)
    if publishes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(layout.world_group)
    if adapters:
        export_adapter(built, layout, model, temporary, saved_dtype(save_dtype, torch.float32))
    else:
        dtype = saved_dtype(save_dtype, stored_dtype(built.model_config))
        keeps_files = layout.keeps_files(node_local=node_local)
        export_model(built, layout, model, temporary, dtype, keeps_files=keeps_files)
    if layout.rank == 0:
        write_card(temporary, run_directory, step)
    dist.barrier(layout.world_group)
    if publishes:
        if final.exists():
            remove_tree(final)
        rename_durably(temporary, final)
    dist.barrier(layout.world_group)
    return final


def export_adapter(
    built: BuiltStage, layout: RankLayout, model: Path, directory: Path, dtype: torch.dtype
) -> None:
    """Write the adapters of all stages to one file, at the first rank."""
    mine = adapter_tensors(built, dtype) if layout.is_first_copy else {}
    parts = gather_at_first(mine if layout.writes_weights else {}, layout)
    tensors = {name: value for part in parts for name, value in part.items()}
    width = max(gather(built.history.width, layout.world_group))
    if layout.rank == 0:
        built.method.write(directory, tensors, width, model)


def export_model(
    built: BuiltStage,
    layout: RankLayout,
    model: Path,
    directory: Path,
    dtype: torch.dtype,
    *,
    keeps_files: bool,
) -> None:
    """Each stage's weights in files of its own, with one index over them."""
    by_rank = gather(file_count(model_parts(built, dtype)), layout.world_group)
    counts = [by_rank[layout.rank_of(stage)] for stage in range(layout.stages)]
    written: dict[str, dict[str, int]] = {}
    if keeps_files:
        before = sum(counts[: layout.stage])
        written = save_model_part(
            built, model, directory, before, sum(counts), dtype, writes=layout.writes_weights
        )
    files = gather(written, layout.world_group)
    if layout.rank == 0:
        finish_model(directory, files, model, built, dtype)


def adapter_tensors(built: BuiltStage, dtype: torch.dtype) -> dict[str, Tensor]:
    """One stage's share of an adapter, under PEFT's names."""
    values = {item.name: item.whole(item.parameter.detach()).cpu() for item in built.trained}
    exported = built.history.exported(values)
    return {name: tensor.to(dtype) for name, tensor in exported.items()}


def model_parts(built: BuiltStage, dtype: torch.dtype) -> list[int]:
    """Bytes of each module of a stage, as they will be stored; a tied head is not."""
    whole = built.cuts.shape
    return [
        dtype.itemsize
        * (
            sum(whole(s.name, s.empty.shape).numel() for s in find_slots({name: module}))
            + sum(whole(n, held.shape).numel() for n, held in quantized_weights_of({name: module}))
        )
        for name, module in built.names.items()
        if not is_tied_head(built, name)
    ]


def save_model_part(
    built: BuiltStage,
    model: Path,
    directory: Path,
    before: int,
    total: int,
    dtype: torch.dtype,
    *,
    writes: bool = True,
) -> dict[str, dict[str, int]]:
    """One stage's weights, trained or not, in files of limited size; one module at a time. Weights
    that are held quantized are written as the base model has them.

    Args:
        model: directory of the base model.
        before: files of the stages before this one; total: files of all stages.
        writes: else weights that are shared with a rank that does are only given to it.

    Returns:
        File name -> tensor name -> bytes.
    """
    writer = ModelWriter(directory, built.skeleton, before, total)
    for size, (name, module) in zip(
        model_parts(built, dtype),
        ((n, m) for n, m in built.names.items() if not is_tied_head(built, n)),
        strict=True,
    ):
        values = {f"{name}.{key}": value.detach() for key, value in module.named_parameters()}
        values = {name: built.cuts.whole(name, value) for name, value in values.items()}
        values |= unquantized(built, model, {name: module})
        if not writes:
            continue
        values = as_saved(built.skeleton, values, dtype)
        writer.add(values | base_buffers(built, model, {name: module}), size)
    return writer.finish()


def base_buffers(
    built: BuiltStage, model: Path, modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The buffers that checkpoints hold, as the base model has them: nothing trains them."""
    values = {slot.name: slot.value.cpu() for slot in stored_buffers(modules)}
    if not values or not has_weights(model):
        return values
    wanted = [(built.method.stored_name(name), value.shape) for name, value in values.items()]
    with StoredWeights(model, built.skeleton) as source:
        found = source.read_buffers(wanted)
        return {
            name: held if stored is None else stored
            for (name, held), stored in zip(values.items(), found, strict=True)
        }


def unquantized(
    built: BuiltStage, model: Path, modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The base model's values of weights that are held quantized; dequantized where it has none."""
    held = {name: (part, attribute) for name, part, attribute in quantized_places(modules)}
    if not held or not has_weights(model):
        return {
            name: built.cuts.whole(name, part.dequantized(attribute))
            for name, (part, attribute) in held.items()
        }
    wanted = [
        (built.method.stored_name(name), built.cuts.shape(name, part.shape_of(attribute)))
        for name, (part, attribute) in held.items()
    ]
    values: dict[str, Tensor] = {}
    with grown(StoredWeights(model, built.skeleton), built.architecture) as source:
        for name, value in zip(held, source.read(wanted), strict=True):
            assert isinstance(value, Tensor)
            values[name] = value
    return values


def finish_model(
    directory: Path,
    files: Sequence[Mapping[str, dict[str, int]]],
    model: Path,
    built: BuiltStage,
    dtype: torch.dtype,
) -> None:
    """The index over the stages' files, config and tokenizer, as transformers expects."""
    write_index(directory, {name: sizes for part in files for name, sizes in part.items()})
    copy_model_files(model, directory, built.skeleton, dtype)
    write_tokenizer(model, directory, built.architecture.overrides.new_tokens)


def stored_dtype(config: Any) -> torch.dtype:
    """The base model's type."""
    return getattr(config, "dtype", None) or torch.float32


def saved_dtype(setting: str, auto: torch.dtype) -> torch.dtype:
    """Return the dtype that `checkpoint.save_dtype` names, or `auto`."""
    chosen: torch.dtype = auto if setting == "auto" else getattr(torch, setting)
    return chosen


def is_tied_head(built: BuiltStage, name: str) -> bool:
    """Return whether a module is a head whose weight is saved as the embedding's."""
    return built.architecture.tied and name == built.architecture.family.head
