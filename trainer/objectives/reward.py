"""Reward models by the Bradley-Terry model (https://arxiv.org/abs/2203.02155), as TRL trains them.

Rewards may be centered about 0 (https://arxiv.org/abs/2312.09244).
"""

import torch
from torch import Tensor
from torch.nn import functional

from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.objectives.objective import Objective
from headrace.trainer.objectives.row_loss import RowLoss, TokenValues
from headrace.trainer.objectives.rows import pair_rows
from headrace.trainer.stage.loss import LossInputs
from headrace.trainer.stage.micro_batch import PairLosses, StageOutput


class Reward(Objective):
    """-log sigmoid of what the chosen answer is given above the rejected one."""

    def loss(self, inputs: LossInputs) -> StageOutput:
        ends, hidden = inputs.micro_batch.extras.ends, inputs.hidden
        assert ends is not None
        places = torch.tensor(ends, device=hidden.device).view(-1, 2)
        rewards = inputs.head.scores(hidden[places[:, 0], places[:, 1]], inputs.seed)
        chosen, rejected = rewards.chunk(2)
        pairs = self.compare(chosen, rejected)
        loss = pairs.loss.sum() * inputs.micro_batch.loss_scale
        if not ends:
            loss = hidden.sum() * 0.0  # a sum over no pairs has no gradient
        nothing = torch.zeros(hidden.shape[:2], device=hidden.device)
        return StageOutput(loss, nothing, pairs=pairs.detach())

    def compare(self, chosen: Tensor, rejected: Tensor) -> PairLosses:
        """Return the loss of each pair, [n], beside the rewards."""
        loss = -functional.logsigmoid(chosen - rejected)
        if self.config.center:
            loss = loss + self.config.center * (chosen + rejected) ** 2
        return PairLosses(loss, chosen, rejected)

    def row_losses(
        self, tokens: TokenValues, pairs: list[list[float]] | None, inputs: StepInputs
    ) -> list[RowLoss]:
        return pair_rows(tokens, pairs or [], inputs, 0.0)
