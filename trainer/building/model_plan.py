"""A whole model without memory, with what will be trained in it: what stages are cut from."""

from dataclasses import dataclass

from torch import nn

from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.building.model_size import ModelSize
from headrace.trainer.quantized.frozen_weight import Quantizer
from headrace.trainer.stage.spec import Objective


@dataclass(frozen=True)
class Plan:
    """A whole model on the meta device, and how it is run and trained."""

    architecture: Architecture
    plain: nn.Module  # without adapters, to know what names mean
    model: nn.Module  # with adapters
    method: TuningMethod
    prefix: str  # before the model's own names
    quantization: Quantizer | None
    objective: Objective
    size: ModelSize  # taken before any stage is filled, which leaves quantized weights out
    teacher: "Plan | None" = None  # of the model that is learned from

    @property
    def vision_paths(self) -> list[str]:
        """Return the paths of vision tower and projector, if the model is run with them."""
        vision = self.architecture.vision
        return [] if vision is None else vision.paths
