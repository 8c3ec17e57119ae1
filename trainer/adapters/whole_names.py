"""The names that a multimodal checkpoint's own model has for the parts of its text model.

Adapters of the text model are written under these, so that PEFT finds them over the checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from headrace.trainer.adapters.names import PEFT_PREFIX
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.weight_names import text_names


@dataclass(frozen=True)
class WholeNames:
    """Pairs of the beginning of a name in the text model and in the whole one."""

    prefixes: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()  # of the whole model

    def outward(self, name: str) -> str:
        """Return a text model's name, of a module or a tensor of an adapter, in the whole model."""
        return _replaced(name, self.prefixes)

    def inward(self, name: str) -> str:
        """Return a whole model's name in the text model; others stay as they are."""
        return _replaced(name, tuple((whole, text) for text, whole in self.prefixes))


def whole_names(directory: Path, architecture: Architecture) -> WholeNames:
    """Return the names in the model that a directory's config describes; none that differ if it
    describes the text model itself.
    """
    if architecture.vision is not None:
        return WholeNames()
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.get_text_config() is config or type(config) not in _multimodal():
        return WholeNames()
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    family, names = architecture.family, [name for name, _ in whole.named_parameters()]
    embedding = _find(names, f"{family.embedding}.weight").removesuffix(".weight")
    inner = family.embedding.partition(".")[2]
    pairs = [(family.embedding.removesuffix(inner), embedding.removesuffix(inner))]
    modules = tuple(name for name, _ in whole.named_modules())
    heads = [name for name in modules if name.endswith(family.head)]
    pairs += [(f"{family.head}.", f"{head}.") for head in heads[:1]]
    differing = tuple((text, own) for text, own in pairs if text != own)
    return WholeNames(differing, modules)


def _multimodal() -> Any:
    """Return transformers' mapping from config classes to multimodal models."""
    return AutoModelForImageTextToText._model_mapping


def _find(names: list[str], text_name: str) -> str:
    """Return the name in the whole model of a tensor of the text model."""
    return next((name for name in names if text_name in text_names(name)), text_name)


def _replaced(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """Return a name with the first fitting beginning replaced, behind PEFT's own."""
    start = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    rest = name.removeprefix(PEFT_PREFIX)
    for old, new in prefixes:
        if f"{rest}.".startswith(old):
            return start + f"{new}{f'{rest}.'.removeprefix(old)}".removesuffix(".")
    return name
