"""Chunks of layers that a stage holds under an interleaved schedule, built one by one."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.history import AdapterHistory
from headrace.trainer.building.model_builder import BuiltStage, build_stage, plan_model
from headrace.trainer.layers.sequence_slice import WHOLE, SequenceSlice


def build_chunks(
    config: TrainConfig, stage: int, device: torch.device, sequence: SequenceSlice = WHOLE
) -> BuiltStage:
    """Build the parts of the model that a stage holds: every n-th of n stages.

    Raises:
        ConfigError, DataError: as `build_stage`.
    """
    plan = plan_model(config)
    mine = range(stage, config.parts, config.pipeline_stages)
    return join([build_stage(config, part, device, plan, sequence) for part in mine])


def join(built: Sequence[BuiltStage]) -> BuiltStage:
    """Several parts of one model as one."""
    return replace(
        built[0],
        chunks=list(chain.from_iterable(part.chunks for part in built)),
        trained=list(chain.from_iterable(part.trained for part in built)),
        tied_copy=next((part.tied_copy for part in built if part.tied_copy is not None), None),
        layers=list(chain.from_iterable(part.layers for part in built)),
        history=AdapterHistory(
            {name: value for part in built for name, value in part.history.initial.items()}
        ),
    )
