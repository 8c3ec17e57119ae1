"""Adapters by PEFT's names: in the model, and in the files that it reads."""

import re
from collections.abc import Iterator, Mapping

from peft.tuners.lora import LoraLayer
from torch import nn

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the only adapter
CONTROL = "control_adapter"  # name of a control adapter in its decoder layer
ROWS = "trainable_tokens_delta"  # PEFT's name for trained rows of an embedding or a head
WRAPPERS = rf"token_adapter|base_layer|original_module|modules_to_save\.{ADAPTER}"
WRAPPING = re.compile(rf"\.({WRAPPERS})(?=\.)")


def base_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return WRAPPING.sub("", name.removeprefix(PEFT_PREFIX))


def is_control(name: str) -> bool:
    """Return whether a parameter belongs to a control adapter."""
    return f".{CONTROL}." in f".{name}"


def is_adapter(name: str) -> bool:
    """Return whether a parameter is an adapter's, and in no checkpoint of the base model."""
    return ".lora_" in name or is_control(name) or f".{ROWS}." in f"{name}."


def is_whole(name: str) -> bool:
    """Return whether a parameter belongs to a module trained in full, or to its frozen original."""
    return ".modules_to_save." in name or ".original_module." in name


def file_name(name: str) -> str:
    """A trained parameter's name in `adapter_model.safetensors`."""
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def rows_name(prefix: str, path: str) -> str:
    """Return the name of the trained rows of an embedding or a head at a path."""
    return f"{prefix}{path}.token_adapter.{ROWS}.{ADAPTER}"


def is_named(path: str, target: str) -> bool:
    """Return whether a target means the module at a path, by PEFT's rule."""
    return path == target or path.endswith(f".{target}")


def lora_layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, LoraLayer]]:
    """Yield all adapted modules below named ones, with their names in the whole model."""
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, LoraLayer):
                yield ".".join(filter(None, (prefix, name))), part


def names_of(model: nn.Module) -> list[str]:
    """Return the names of a model's parameters."""
    return [name for name, _ in model.named_parameters()]
