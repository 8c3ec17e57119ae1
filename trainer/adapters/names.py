"""Adapters by PEFT's names: in the model, and in the files that it reads."""

import copy
import math
import re
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from headrace.trainer.adapters.control import is_control

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the only adapter
WRAPPING = re.compile(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER})(?=\.)")


def base_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return WRAPPING.sub("", name.removeprefix(PEFT_PREFIX))


def is_adapter(name: str) -> bool:
    """Return whether a parameter is an adapter's, and in no checkpoint of the base model."""
    return ".lora_" in name or is_control(name)


def file_name(name: str) -> str:
    """A trained parameter's name in `adapter_model.safetensors`."""
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def exported_tensors(
    values: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Trained parameters under PEFT's names.

    Args:
        values: by name in the whole model.
        initial: what adapters that took over frozen weights started from. They are written for the
            base model as it is stored: twice as wide, with their start taken off.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if initial and (".lora_A." in name or ".lora_embedding_A." in name):
            value = torch.cat([value, initial.get(name, torch.zeros_like(value))], dim=0)
        elif initial and (".lora_B." in name or ".lora_embedding_B." in name):
            value = torch.cat([value, -initial.get(name, torch.zeros_like(value))], dim=1)
        tensors[file_name(name)] = value.contiguous()
    return tensors


def side_by_side(values: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters as one of a larger rank: those that were added to the weights, and those there now.

    Args:
        values: by name in the whole model; A is [r, inputs], B [outputs, r].
        merged: [times, ...] of the same.
    """
    return {
        name: torch.cat([*merged[name], value], dim=0 if "_A." in name else 1)
        if name in merged
        else value
        for name, value in values.items()
    }


def as_plain_lora(config: LoraConfig, times: int) -> LoraConfig:
    """The config for adapters that were made several times as wide, at the same scale."""
    factor = math.sqrt(times) if config.use_rslora else times
    wider = copy.deepcopy(config)
    wider.r, wider.lora_alpha = times * config.r, factor * config.lora_alpha
    return wider


def lora_layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, LoraLayer]]:
    """Yield all adapted modules below named ones, with their names in the whole model."""
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, LoraLayer):
                yield ".".join(filter(None, (prefix, name))), part
