"""The frozen record that a stage is constructed from, complete: nobody adds to a `Stage` later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.layers.activation_offload import ActivationOffload
from headrace.trainer.layers.layer_functions import LayerFunctions
from headrace.trainer.layers.router_loss import RouterLossSettings
from headrace.trainer.layers.selective_checkpoint import KeptAttention
from headrace.trainer.layers.weight_offload import WeightOffload
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.input_parts import InputParts
from headrace.trainer.stage.micro_batch import StageOutput
from headrace.trainer.stage.stream import Stream, StreamParts
from headrace.trainer.tensor_parallel.weight_cut import StageCuts
from headrace.trainer.vision.tower import VisionTower

if TYPE_CHECKING:
    from headrace.trainer.stage.loss import LossInputs


class Objective(Protocol):
    """The loss of the last stage; its classes are in `headrace.trainer.objectives`."""

    @property
    def takes_teacher(self) -> bool:
        """Return whether it learns from another model in place of comparing with a reference."""

    def loss(self, inputs: "LossInputs") -> StageOutput:
        """Return the loss of a micro-batch."""


@dataclass(frozen=True)
class StageNames:
    """Names of a stage's modules in the whole (PEFT-wrapped) model, in order of use."""

    embedding: str | None
    layers: list[str]
    norm: str | None
    head: str | None
    prefix: str  # before the model's own names
    first: list[str]  # beside the embedding
    last: list[str]  # between norm and head
    vision: list[str]  # tower and projector

    @property
    def used(self) -> list[str]:
        """List the names of all that are there, in order of use."""
        found = [*self.vision, self.embedding, *self.first, *self.layers]
        return [name for name in [*found, self.norm, *self.last, self.head] if name]


@dataclass(frozen=True)
class Acceleration:
    """Faster parts of a stage; by default there are none.

    Attributes:
        norm: in the place of the model's own, over the same weight.
        layer_functions: how a layer is run.
        before_step: to be called before the micro-batches of a step, with none in flight.
        by_bounds: attention takes the documents' bounds and its window instead of a mask.
        in_blocks: it is FlexAttention then, which wants them by blocks.
        by_rows: but rows of single documents go to cuDNN, sinks and slices included.
        triton_loss: the loss is computed in Triton.
    """

    norm: nn.Module | None = None
    layer_functions: LayerFunctions | None = None
    before_step: Callable[[], None] | None = None
    by_bounds: bool = False
    in_blocks: bool = False
    by_rows: bool = False
    triton_loss: bool = False


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """The modules of one stage, and how they are run.

    Attributes:
        modules: canonical name in the whole model -> module, in order of use.
        names: which of them is what.
        layers: their numbers in the whole model.
        rotary: positions -> cosine and sine, real buffers, no parameters; None for models without.
        autocast: run in `compute_dtype` though the weights are float32 (full fine-tuning).
        recompute: numbers of the layers that keep only their input for the backward pass.
        selective: let these keep some results too, see `selective_checkpoint`.
        kept_attention: let them keep the results of attention, here.
        offload: where these inputs are held in between, if not on the device.
        seeded: set the random state before each layer, for dropout that is the same in any layout.
        embedding_on_cpu: it is none of the parts that move with the stage, as DeepSpeed moves them.
        objective: what the last stage computes.
        noise_alpha: of NEFTune's noise at the embedding, if any.
        sequence: the slice of every row that is held here.
        cuts: the parts of weights that are held here.
        weight_offload: where the layers' weights come from, if they are not on the device.
        tower: runs the vision tower, on the stage that holds it.
    """

    modules: dict[str, nn.Module]
    names: StageNames
    layers: Sequence[int]
    rotary: nn.Module | None
    architecture: Architecture
    router_loss: RouterLossSettings | None
    compute_dtype: torch.dtype
    autocast: bool
    recompute: frozenset[int]
    selective: bool = False
    kept_attention: KeptAttention | None = None
    offload: ActivationOffload | None
    seeded: bool
    objective: Objective
    embedding_on_cpu: bool = False
    noise_alpha: float | None = None
    sequence: SequenceSlice = WHOLE
    cuts: StageCuts = field(default_factory=StageCuts)
    weight_offload: WeightOffload | None = None
    tower: VisionTower | None = None
    acceleration: Acceleration = field(default_factory=Acceleration)

    @property
    def layer_modules(self) -> list[nn.Module]:
        """The decoder layers, or halves of them."""
        return [self.modules[name] for name in self.names.layers]

    @property
    def input_parts(self) -> InputParts:
        """Return the modules that follow the embedding."""
        ends, found = self.architecture.family.ends, self._module
        return InputParts(
            found(ends.projection), found(ends.positions), ends.by_name, found(ends.norm)
        )

    @property
    def stream(self) -> Stream:
        """Return the way from what passes between stages to what layers are given."""
        ends, found = self.architecture.family.ends, self._module
        parts = StreamParts(
            found(ends.rows),
            found(ends.rows_projection),
            found(ends.rows_norm),
            found(ends.copies_in),
            found(ends.copies_out),
        )
        return Stream(self.architecture.stream, parts, self.architecture.config)

    def _module(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.modules.get(self.names.prefix + path)

    @property
    def recomputed(self) -> list[bool]:
        """Return for each layer whether it is run again in the backward pass."""
        return [index in self.recompute for index in self.layers]

    @property
    def moved(self) -> list[nn.Module]:
        """The modules that are on the device; an embedding may stay in host memory."""
        stays = self.names.embedding if self.embedding_on_cpu else None
        return [module for name, module in self.modules.items() if name != stays]

    @property
    def tree(self) -> nn.ModuleList:
        """Return all modules under one, to walk through."""
        rotary = [] if self.rotary is None else [self.rotary]
        return nn.ModuleList([*self.modules.values(), *rotary])

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, in model order."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
