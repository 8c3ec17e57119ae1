"""Trials of a tiny model of the kind that a run trains."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.self_check import (
    check_mlps_can_be_tiled,
    check_rows_can_be_cut,
    check_rows_can_be_sliced,
    check_weights_can_be_cut,
    plan_model,
)
from headrace.trainer.planning.planned_run import RunPlan


class TinyTrials:
    """A `TriedModel` that tries on a tiny one of the kind what may be done to it."""

    def __init__(self, run: RunPlan) -> None:
        self.config, self.architecture = run.config, run.plan.architecture

    @cached_property
    def divides_weights(self) -> bool:
        return passes(check_weights_can_be_cut, self.architecture)

    @cached_property
    def divides_rows(self) -> bool:
        return passes(check_rows_can_be_cut, self.config, self.architecture)

    @cached_property
    def slices_rows(self) -> bool:
        return passes(check_rows_can_be_sliced, self.config, self.architecture)

    @cached_property
    def tiles_mlps(self) -> bool:
        return passes(check_mlps_can_be_tiled, self.config, self.architecture)

    def quantized(self, settings: QuantizationConfig) -> Plan:
        """Return the model with its frozen weights in few bits."""
        return plan_model(self.config.model_copy(update={"quantization": settings}))


def passes(check: Callable[..., None], *args: Any) -> bool:
    """Return whether a check refuses nothing."""
    try:
        check(*args)
    except ConfigError:
        return False
    return True
