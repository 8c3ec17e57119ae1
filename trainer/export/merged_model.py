"""A model with an adapter's change in its weights, made layer by layer."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.progress import Progress, silent
from headrace.trainer.adapters.names import PEFT_PREFIX, ROWS, base_name, file_name, is_adapter
from headrace.trainer.adapters.patterns import name_modules
from headrace.trainer.adapters.peft_settings import read_overrides, read_peft_settings
from headrace.trainer.adapters.token_rows import RowAdapter, add_token_rows
from headrace.trainer.adapters.whole_names import WholeNames, whole_names
from headrace.trainer.adapters.wrapping import add_adapter
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_writer import (
    PROCESSOR_FILES,
    ModelWriter,
    as_saved,
    copy_model_files,
    file_count,
    write_index,
    write_tokenizer,
)
from headrace.trainer.architecture.overrides import overridden
from headrace.trainer.architecture.read_architecture import lay_out, read_architecture
from headrace.trainer.architecture.weight_index import adapter_file
from headrace.trainer.building.directory_weights import StoredWeights
from headrace.trainer.building.parameter_slots import Slot, find_slots, stored_buffers
from headrace.trainer.building.weight_source import ScoredWeights, WeightSource, grown
from headrace.trainer.objectives.scored_model import with_score


def write_merged(
    model: Path,
    adapter: Path,
    output: Path,
    scale: float = 1.0,
    device: str = "cpu",
    progress: Progress = silent,
) -> int:
    """Write base model plus adapter into an empty directory.

    A tied embedding stays tied unless the adapter changes embedding or head.

    Returns:
        How many weights were changed.

    Raises:
        ConfigError: the model is quantized in a format that is not read, or a scale for what
            cannot be scaled.
        DataError: the adapter does not belong to the model.
    """
    architecture, settings = architecture_with(model, adapter)
    check_scale(scale, settings)
    skeleton: Any = lay_out(architecture)
    names = whole_names(model, architecture)
    wrapped = wrap(architecture, skeleton, settings, names, adapter)
    stored = load_file(adapter_file(adapter))
    tensors = {names.inward(name): value for name, value in stored.items()}
    count, unused = 0, set(tensors)
    paths = paths_to_write(architecture, skeleton, tensors)
    dtype = getattr(architecture.config, "dtype", None) or torch.float32
    sizes = [stored_size(architecture.part(skeleton, path), dtype) for path in paths]
    writer = ModelWriter(output, skeleton, 0, file_count(sizes))
    with base_weights(model, architecture) as source:
        for path, size in progress(list(zip(paths, sizes, strict=True)), sizes, "merge"):
            name, module = PEFT_PREFIX + path, architecture.part(wrapped, path, PEFT_PREFIX)
            slots = list(find_slots({name: module}))
            unused -= fill_adapter(slots, tensors, adapter)
            unused -= fill_base(slots, source, architecture, tensors, adapter)
            for parameter in module.parameters():  # buffers are still without memory
                parameter.data = parameter.data.to(device)
            count += scale_and_count(module, scale)
            values = merged_values(name, module)
            values = as_saved(skeleton, values, dtype)
            writer.add(values | read_buffers(name, module, source), size)
            module.to("meta")
    if unused:
        raise DataError(f"{adapter}: {model} has no place for its tensor {sorted(unused)[0]}")
    write_index(output, writer.finish())
    copy_model_files(model, output, skeleton, dtype)
    write_tokenizer(model, output, architecture.overrides.new_tokens)
    return count


def architecture_with(model: Path, adapter: Path) -> tuple[Architecture, LoraConfig]:
    """Return a model as the adapter was trained with it, and the adapter's settings."""
    vision = any((adapter / name).is_file() for name in PROCESSOR_FILES)  # trained with its tower
    base = read_architecture(model, vision=vision)
    architecture = overridden(base, read_overrides(adapter), str(model))
    settings = read_peft_settings(adapter)
    if settings.task_type == "SEQ_CLS":
        architecture = with_score(architecture, str(model))
    return architecture, settings


def wrap(
    architecture: Architecture,
    skeleton: nn.Module,
    settings: LoraConfig,
    names: WholeNames,
    adapter: Path,
) -> nn.Module:
    """Return a model without memory, with an adapter around it.

    Args:
        settings: the adapter's, whose expressions are resolved; in place.
    """
    modules = names.modules or [n for n, _ in skeleton.named_modules()]
    parameters = [names.outward(n) for n, _ in skeleton.named_parameters()]
    name_modules(settings, modules, adapter, parameters, names.inward)
    tokens, settings.trainable_token_indices = token_rows(settings), None
    wrapped = add_adapter(lay_out(architecture), settings)
    if tokens:
        add_token_rows(wrapped, rows_at(architecture), tokens)
    return wrapped


def base_weights(model: Path, architecture: Architecture) -> WeightSource:
    """Return a model's weights; an adapter brings those of a head of one number itself."""
    stored = StoredWeights(model, lay_out(architecture))
    stored.tell_unexpected()
    source = grown(stored, architecture)
    return ScoredWeights(source, architecture.config, 0) if architecture.scored else source


def token_rows(settings: LoraConfig) -> list[int]:
    """Return the tokens whose rows an adapter has trained.

    Raises:
        ConfigError: they differ by module.
    """
    found = settings.trainable_token_indices or []
    lists = list(found.values()) if isinstance(found, dict) else [found]
    if any(tokens != lists[0] for tokens in lists):
        raise ConfigError("trainable_token_indices differ by module; merge it with PEFT")
    return sorted(lists[0])


def rows_at(architecture: Architecture) -> list[str]:
    """Return the modules that have trained rows; a tied head is written as the embedding."""
    family = architecture.family
    paths = [family.embedding] if architecture.tied else [family.embedding, family.head]
    return [PEFT_PREFIX + path for path in paths]


def check_scale(scale: float, settings: LoraConfig) -> None:
    """Check that an adapter can be added by another factor than 1, if it is to be.

    Raises:
        ConfigError: its parts are no sums.
    """
    whole = settings.modules_to_save or settings.trainable_token_indices
    if scale != 1 and (settings.use_dora or whole):
        kind = (
            "DoRA adapters"
            if settings.use_dora
            else "whole modules"
            if settings.modules_to_save
            else "rows"
        )
        raise ConfigError(f"--scale {scale}: {kind} cannot be scaled; merge them as they are")


def paths_to_write(
    architecture: Architecture, skeleton: Any, tensors: Mapping[str, Tensor]
) -> list[str]:
    """List the parts of a model that are written, one after the other.

    A tied head is none of them, unless the adapter changes it or the embedding; then the
    skeleton's config unties them.
    """
    family = architecture.family
    paths = architecture.parts
    if architecture.tied:
        ends = (f".{family.embedding}.", f".{family.head}.")
        if any(end in name for end in ends for name in tensors if ROWS not in name):
            skeleton.config = copy.deepcopy(architecture.model_config)
            for config in (skeleton.config, skeleton.config.get_text_config()):
                config.tie_word_embeddings = False
        else:
            paths.remove(family.head)
    return paths


def scale_and_count(module: nn.Module, scale: float) -> int:
    """Scale the adapters below a module; returns how many weights they and saved modules change."""
    count = 0
    for part in module.modules():
        if isinstance(part, LoraLayer):
            for name in part.scaling:
                part.scaling[name] *= scale
            count += 1
        elif hasattr(part, "modules_to_save") or isinstance(part, RowAdapter):
            count += 1
    return count


def stored_size(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters in a file."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def belongs_to_adapter(slot: Slot) -> bool:
    """Return whether the adapter's file holds this parameter."""
    if is_adapter(slot.name):
        return True
    # what transformers freezes is never trained, and older files do not hold it
    return ".modules_to_save." in slot.name and slot.empty.requires_grad


def fill_adapter(slots: Sequence[Slot], tensors: Mapping[str, Tensor], adapter: Path) -> set[str]:
    """Give adapters the values of their file; returns the names that were used.

    Raises:
        DataError: the file lacks one.
    """
    used = set()
    for slot in filter(belongs_to_adapter, slots):
        name = file_name(slot.name)
        if name not in tensors:
            raise DataError(f"{adapter}: no tensor {name}, which its config calls for")
        check_shape(slot, tensors[name], adapter)
        used.add(name)
        slot.fill(nn.Parameter(tensors[name].float()))
    return used


def fill_base(
    slots: Sequence[Slot],
    source: WeightSource,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    adapter: Path,
) -> set[str]:
    """Give all other parameters their values, in float32: those of the base model.

    PEFT writes the weights below adapters on embedding and head, which then count.

    Args:
        tensors: of the adapter's file.

    Returns:
        The names of its tensors that were used.
    """
    family = architecture.family
    rest = [slot for slot in slots if not belongs_to_adapter(slot)]
    used = {file_name(slot.name) for slot in rest} & tensors.keys()
    for slot in rest:
        if (name := file_name(slot.name)) in used:
            check_shape(slot, tensors[name], adapter)
            slot.fill(nn.Parameter(tensors[name].float(), requires_grad=False))
    rest = [slot for slot in rest if file_name(slot.name) not in used]
    wanted = []
    for slot in rest:
        name = base_name(slot.name)
        if architecture.tied and name == f"{family.head}.weight":
            name = f"{family.embedding}.weight"
        wanted.append((name, slot.empty.shape))
    for slot, value in zip(rest, source.read(wanted), strict=True):
        assert isinstance(value, Tensor)
        slot.fill(nn.Parameter(value.float(), requires_grad=False))
    return used


def check_shape(slot: Slot, value: Tensor, adapter: Path) -> None:
    """Compare a tensor of the adapter's file with its slot in the model.

    Raises:
        DataError: they differ in shape.
    """
    if value.shape != slot.empty.shape:
        raise DataError(
            f"{adapter}: {file_name(slot.name)} has shape {list(value.shape)}, "
            f"the model calls for {list(slot.empty.shape)}"
        )


def read_buffers(name: str, module: nn.Module, source: WeightSource) -> dict[str, Tensor]:
    """A module's buffers, those that the base model's files hold."""
    slots = stored_buffers({name: module})
    names = list(dict.fromkeys(base_name(slot.name) for slot in slots))
    shapes = {base_name(slot.name): slot.value.shape for slot in slots}
    values = source.read_buffers([(name, shapes[name]) for name in names])
    found = zip(names, values, strict=True)
    return {name: value for name, value in found if value is not None}


def merged_values(name: str, module: Any) -> dict[str, Tensor]:
    """A module's parameters under the names of the model without adapters, all changes added."""
    for part in list(module.modules()):
        if isinstance(part, LoraLayer):
            part.merge(safe_merge=True)
        elif isinstance(part, RowAdapter):
            part.merge()
    return {
        base_name(key): parameter.detach()
        for key, parameter in module.named_parameters(prefix=name)
        if not is_adapter(key) and ".original_module." not in key
    }
