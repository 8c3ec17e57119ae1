"""A stage as it was built: its chunks, what is trained in it, and the facts that training needs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headrace.trainer.adapters.history import AdapterHistory
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.building.checkpoint_files import INITIAL, MERGED, tensor_name
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.stage.stage import Stage
from headrace.trainer.tensor_parallel.weight_cut import StageCuts


@dataclass(frozen=True)
class BuiltStage:
    """The part of the model in one process, with its weights, and the facts training needs."""

    chunks: list[Stage]  # in the order of the model; one, unless the schedule is interleaved
    trained: list[TrainedParameter]
    tied_copy: nn.Parameter | None  # a trained tied embedding, or the last stage's copy of it
    tied_head: nn.Parameter | None  # single stage: the head, over the memory of `tied_copy`
    model_config: Any
    method: TuningMethod
    layers: list[Span]  # of each chunk
    architecture: Architecture
    skeleton: Any  # the whole model without adapters, on the meta device
    cuts: StageCuts = field(default_factory=StageCuts)  # of all chunks
    history: AdapterHistory = field(default_factory=AdapterHistory)
    flops_per_token: float = 0.0  # of the whole model, forward and backward

    @property
    def stage(self) -> Stage:
        """The only chunk."""
        (stage,) = self.chunks
        return stage

    @property
    def names(self) -> dict[str, nn.Module]:
        """Modules of all chunks by their names in the whole model, in order of use."""
        return {name: module for chunk in self.chunks for name, module in chunk.names.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Return what checkpoints hold of adapters beside their values, by their own names."""
        kept = {tensor_name(MERGED, name): value for name, value in self.history.merged.items()}
        for name, value in self.history.initial.items():
            kept[tensor_name(INITIAL, name)] = value
        return kept
