"""Earlier values of adapters, which exporting them needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.trainer.adapters.names import file_name


@dataclass(frozen=True)
class AdapterHistory:
    """Earlier values of adapters, by name in the whole model.

    Attributes:
        initial: what those that took over frozen weights started from.
        merged: [restarts, ...] what restarts have added to the weights.
    """

    initial: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Return the rank of the exported adapters as a multiple of the trained ones'."""
        restarts = max((len(values) for values in self.merged.values()), default=0)
        return 2 if self.initial else 1 + restarts

    def exported(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return trained parameters as they are written, by their names in files."""
        return exported_tensors(side_by_side(values, self.merged), self.initial)


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
