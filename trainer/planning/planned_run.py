"""The record of a run laid out on GPUs before there is one."""

from dataclasses import dataclass
from typing import Protocol

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import ModelSize
from headrace.trainer.planning.memory_model import LayerActivations, StageMemory

GIB = 1 << 30


@dataclass(frozen=True)
class StagePlan:
    """One process of a replica."""

    layers: list[Span]  # of each chunk
    weights: int  # parameters
    trained: int
    memory: StageMemory
    work: float  # floating-point operations a token


@dataclass(frozen=True)
class RunPlan:
    """One replica, and how well its stages work together."""

    config: TrainConfig
    plan: Plan
    replicas: int
    sequence_len: int
    activations: LayerActivations
    size: ModelSize  # of what a rank holds
    stages: list[StagePlan]

    @property
    def peak(self) -> float:
        """Bytes of the fullest process."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def layout(self) -> str:
        """Return the sizes of the parallel dimensions, beside the stages."""
        shares = self.config.sequence_parallel
        rows = f", whose rows {shares} ranks share" if shares > 1 else ""
        parts, slices = self.config.tensor_parallel, self.config.sequence_slices
        weights = f", whose weights {parts} ranks share" if parts > 1 else ""
        sliced = f", rows in {slices} slices" if slices > 1 else ""
        return f"{self.replicas} replica(s){rows}{weights}{sliced}"

    @property
    def bubble(self) -> float:
        """Share of the time in which a stage waits for the pipeline to fill and drain."""
        waiting = self.config.pipeline_stages - 1
        chunks = self.config.parts // self.config.pipeline_stages
        passes = self.config.gradient_accumulation_steps * chunks * self.config.sequence_slices
        return waiting / (passes + waiting)

    @property
    def balance(self) -> float:
        """Work of the mean stage over that of the slowest."""
        work = [stage.work for stage in self.stages]
        return sum(work) / len(work) / max(work)

    @property
    def efficiency(self) -> float:
        """Share of the time in which the mean stage computes; transfers left out."""
        return self.balance * (1 - self.bubble)


class TriedModel(Protocol):
    """The model of a run, asked what may be done to it; answers are found when first asked for."""

    @property
    def divides_weights(self) -> bool:
        """Return whether ranks may hold a part of each weight."""

    @property
    def divides_rows(self) -> bool:
        """Return whether ranks may hold a part of each row."""

    @property
    def slices_rows(self) -> bool:
        """Return whether rows may go through the stages in slices."""

    @property
    def tiles_mlps(self) -> bool:
        """Return whether MLPs may go over parts of the tokens."""

    def quantized(self, settings: QuantizationConfig) -> Plan:
        """Return the model with its frozen weights in few bits."""
