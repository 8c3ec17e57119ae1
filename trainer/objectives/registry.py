"""The objective that a config names."""

import importlib

from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.trainer.objectives.objective import Objective


def objective_of(config: ObjectiveConfig) -> Objective:
    """Return the objective, made by the class that its record names."""
    module, _, name = config.record.factory.partition(":")
    objective: Objective = getattr(importlib.import_module(module), name)(config)
    return objective
