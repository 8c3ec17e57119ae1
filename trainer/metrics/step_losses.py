"""Losses of one run through the stages, on their way from the device to the host."""

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.metrics.step_values import StepValues, sample_of
from headrace.trainer.metrics.token_summary import TokenSample
from headrace.trainer.objectives.objective import Objective
from headrace.trainer.objectives.row_loss import RowLoss
from headrace.trainer.stage.head_loss import vocabulary
from headrace.trainer.stage.micro_batch import StageOutput
from headrace.trainer.stage.stage import Stage


class StepLosses:
    """Losses of a step or an evaluation at one rank; reading them waits for the device.

    The copy begins here, so that no later work of the device is waited for.

    Args:
        chunks: of this stage.
        outputs: of the micro-batches, on the last stage.
        router_losses: of the micro-batches, scalars; on stages with routers.
        slices: in which rows have gone through the stages.
    """

    def __init__(
        self,
        chunks: Sequence[Stage],
        inputs: StepInputs,
        outputs: Sequence[StageOutput],
        router_losses: Sequence[Tensor],
        slices: int = 1,
    ) -> None:
        self._chunks = chunks
        self._inputs = inputs
        self._values = StepValues(outputs, router_losses, chunks[0].sequence, slices)

    @cached_property
    def rows(self) -> list[RowLoss]:
        """Losses of this replica's rows, padding left out, at one rank of the last stage."""
        last = self._chunks[-1]
        if last.loss is None or self._inputs.rows is None:
            return []
        assert isinstance(last.objective, Objective)
        return last.objective.row_losses(self._values.tokens(), self._values.pairs(), self._inputs)

    @property
    def router_loss(self) -> float | None:
        """This rank's part of the mean over layers, before its coefficient."""
        settings = self._chunks[0].router_loss
        if settings is None:
            return None
        return math.fsum(self._values.router_losses()) / settings.coefficient

    def token_sample(self) -> TokenSample | None:
        """Statistics of this replica's trained tokens, where wanted, as `rows`."""
        loss = self._chunks[-1].loss
        if loss is None or self._inputs.rows is None:
            return None
        return sample_of(self._values.tokens(), self._inputs, vocabulary(loss.head))
