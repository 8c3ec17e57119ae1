"""Stages of a config, built as a run builds them."""

import torch

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building import model_builder
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.self_check import plan_model


def build_stage(
    config: TrainConfig, stage: int, device: torch.device, plan: Plan | None = None
) -> BuiltStage:
    """Plan the model of a config, unless a plan is given, and build one stage."""
    return model_builder.build_stage(config, stage, device, plan or plan_model(config))


def build_chunks(config: TrainConfig, stage: int, device: torch.device) -> BuiltStage:
    """Plan the model of a config and build what a stage holds of it."""
    return model_builder.build_chunks(config, stage, device, plan_model(config))
