"""The adapter that training starts from: every tensor of its file has one place in the model."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.names import ADAPTER, base_name, file_name, is_adapter
from headrace.trainer.adapters.patterns import name_modules
from headrace.trainer.adapters.peft_settings import read_peft_settings
from headrace.trainer.adapters.whole_names import WholeNames
from headrace.trainer.architecture.weight_index import adapter_file


class StartingAdapter:
    """The values that an adapter's file has for a model's parameters.

    Args:
        names: of the model that the adapter was made for.

    Raises:
        ConfigError, DataError: it has a setting that is refused, or no file.
    """

    def __init__(self, directory: Path, plain: nn.Module, names: WholeNames) -> None:
        self.directory = directory
        self.plain = plain
        self.names = names
        self.settings = read_peft_settings(directory)
        modules = list(names.modules) or [name for name, _ in plain.named_modules()]
        parameters = [names.outward(name) for name, _ in plain.named_parameters()]
        name_modules(self.settings, modules, directory, parameters, names.inward)

    def resolved(self, config: AdapterConfig) -> AdapterConfig:
        """Return a config whose expressions are names in the model that is trained."""
        found = self.settings
        targets, excluded = found.target_modules or set(), found.exclude_modules or set()
        changes: dict[str, Any] = {
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "exclude_modules": sorted(excluded),
            "target_parameters": sorted(found.target_parameters or ()),
            "rank_pattern": found.rank_pattern,
            "alpha_pattern": found.alpha_pattern,
        }
        return config.model_copy(update=changes)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file by their names for today's model; of older ones as PEFT turns
        them.
        """
        stored = load_file(adapter_file(self.directory))
        tensors = {self.names.inward(name): value for name, value in stored.items()}
        converted: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            self.plain, LoraConfig(), tensors, ADAPTER
        )
        return converted

    def value(self, name: str) -> Tensor | None:
        """Return the value of a parameter of the wrapped model; None where the file has none."""
        return self.tensors.get(file_name(name))

    def check(self, wrapped: nn.Module, others: tuple[str, ...], absent: set[str]) -> None:
        """Compare the file with the model, name by name.

        Args:
            others: weights of the model without adapters that it may hold as well.
            absent: names of tensors that another stands for.

        Raises:
            DataError: a tensor is missing, has no place, or is of another shape.
        """
        shapes, needed = {}, set()
        for name, parameter in places(wrapped, others):
            shapes[file_name(name)] = tuple(parameter.shape)
            if is_adapter(name) or (parameter.requires_grad and base_name(name) not in others):
                needed.add(file_name(name))
        for name in sorted(needed - absent - self.tensors.keys()):
            raise DataError(f"{self.directory}: no tensor {name}, which its config calls for")
        for name in sorted(self.tensors.keys() - shapes.keys()):
            raise DataError(f"{self.directory}: the model has no place for its tensor {name}")
        for name, value in self.tensors.items():
            if tuple(value.shape) != shapes[name]:
                raise DataError(
                    f"{self.directory}: {name} has shape {list(value.shape)}, the model calls for "
                    f"{list(shapes[name])}"
                )


def places(wrapped: nn.Module, others: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that an adapter's file may hold: adapters, modules that are trained in
    full, and `others`, which PEFT saves where an adapter or new tokens are on them.
    """
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):
        whole = ".modules_to_save." in name
        other = base_name(name) in others and ".original_module." not in name
        if is_adapter(name) or whole or other:
            yield name, parameter
