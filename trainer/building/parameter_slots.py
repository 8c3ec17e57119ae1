"""The places of a stage's parameters, and those parameters that are trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.trainer.quantized.frozen_weight import FrozenWeight
from headrace.trainer.quantized.modules import QuantizableModule
from headrace.trainer.tensor_parallel.weight_cut import WeightCut


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that the optimizer steps, under its name in the whole model.

    `owned` is false for the copy of a tied embedding that the last stage keeps as its head: it is
    stepped there as well, but counted, clipped by and saved from the first stage only.

    Attributes:
        cut: where several ranks share the weight; None: the parameter is all of it.
        is_partial: the gradients of the ranks that share weights are to be added up.
    """

    name: str
    parameter: nn.Parameter
    owned: bool
    cut: WeightCut | None = None
    is_partial: bool = False

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the whole weight."""
        return self.parameter.shape if self.cut is None else self.cut.shape

    def whole(self, value: Tensor) -> Tensor:
        """Put the parts of a tensor like the parameter together; ranks that share it take part."""
        cut = self.cut
        if cut is None or value.shape != self.parameter.shape:
            return value
        return cut.whole(value.to(self.parameter.device))

    def part(self, whole: Tensor) -> Tensor:
        """Return what this rank holds of a tensor like the whole weight."""
        return whole if self.cut is None else self.cut.part(whole)


@dataclass(frozen=True)
class Slot:
    """A place in a module where a parameter belongs."""

    name: str  # in the whole (PEFT-wrapped) model
    owner: nn.Module
    attribute: str
    empty: nn.Parameter

    def fill(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.attribute] = parameter


def find_slots(modules: Mapping[str, nn.Module]) -> Iterator[Slot]:
    """Yield the slots for parameters below named modules, in order."""
    for prefix, module in modules.items():
        for owner_name, owner in module.named_modules():
            for attribute, empty in list(owner._parameters.items()):
                if empty is not None:
                    name = ".".join(part for part in (prefix, owner_name, attribute) if part)
                    yield Slot(name, owner, attribute, empty)


@dataclass(frozen=True)
class BufferSlot:
    """A place in a module where a buffer belongs."""

    name: str  # in the whole (PEFT-wrapped) model
    owner: nn.Module
    attribute: str
    persistent: bool  # whether checkpoints of the model hold it

    @property
    def value(self) -> Tensor:
        value = self.owner._buffers[self.attribute]
        assert value is not None
        return value

    def fill(self, value: Tensor) -> None:
        self.owner._buffers[self.attribute] = value


def find_buffers(modules: Mapping[str, nn.Module]) -> Iterator[BufferSlot]:
    """Yield the slots of buffers below named modules, quantized weights left out, in order."""
    for prefix, module in modules.items():
        for owner_name, owner in module.named_modules():
            if isinstance(owner, FrozenWeight):
                continue
            for attribute, value in list(owner._buffers.items()):
                if value is not None:
                    name = ".".join(part for part in (prefix, owner_name, attribute) if part)
                    kept = attribute not in owner._non_persistent_buffers_set
                    yield BufferSlot(name, owner, attribute, kept)


def stored_buffers(modules: Mapping[str, nn.Module]) -> list[BufferSlot]:
    """The buffers below named modules that checkpoints hold."""
    return [slot for slot in find_buffers(modules) if slot.persistent]


def holds_quantized(slot: Slot) -> bool:
    """Return whether the value for a slot is to be quantized."""
    owner = slot.owner
    return (
        isinstance(owner, QuantizableModule)
        and slot.attribute in owner.bits
        and not slot.empty.requires_grad
    )
