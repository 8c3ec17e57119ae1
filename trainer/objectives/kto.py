"""Kahneman-Tversky optimization: single answers with labels (https://arxiv.org/abs/2402.01306).

The baseline is the mean, over the micro-batch, of how much likelier than to the reference answers
to other prompts are, and no less than 0; no gradient goes through it. APO-zero has none
(https://arxiv.org/abs/2408.06266).
"""

import torch
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.objectives.objective import Objective
from headrace.trainer.objectives.pairs import Answers, log_ratios, sum_side
from headrace.trainer.objectives.row_loss import RowLoss, TokenValues
from headrace.trainer.objectives.rows import answer_rows
from headrace.trainer.stage.loss import LossInputs
from headrace.trainer.stage.micro_batch import AnswerLosses, StageOutput


class Kto(Objective):
    """1 - sigmoid of the reward over the baseline, or of a bad answer's the other way round."""

    def loss(self, inputs: LossInputs) -> StageOutput:
        extras, whole = inputs.micro_batch.extras, inputs.head.sequence.join
        assert extras.pairs is not None and inputs.before is not None
        assert extras.desirable is not None
        losses = inputs.token_losses()
        tokens = (whole(losses), whole(inputs.before), whole(inputs.labels) != IGNORED_LABEL)
        desirable = torch.tensor(extras.desirable, dtype=torch.bool, device=losses.device)
        others = sum_side(*tokens, extras.pairs, 1) if extras.mismatched else None
        answers = self.judge(sum_side(*tokens, extras.pairs, 0), others, desirable)
        loss = answers.loss.sum() * inputs.micro_batch.loss_scale
        if not extras.desirable:
            loss = losses.sum() * 0.0  # a sum over no answers has no gradient
        statistics, found = inputs.statistics, answers.detach()
        return StageOutput(loss, losses.detach(), pairs=found, statistics=statistics)

    def judge(self, own: Answers, others: Answers | None, desirable: Tensor) -> AnswerLosses:
        """Return the loss, the reward and the baseline of each answer.

        Args:
            others: the same prompts with other answers; None without a baseline.
            desirable: [n] bool.
        """
        config = self.config
        rewards = config.beta * log_ratios(own)
        baseline = torch.zeros_like(rewards.detach())
        if others is not None and len(rewards):
            baseline += config.beta * log_ratios(others).detach().mean().clamp(min=0)
        margins = torch.where(desirable, rewards - baseline, baseline - rewards)
        weights = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
        return AnswerLosses(weights * torch.sigmoid(-margins), rewards, baseline)

    def row_losses(
        self, tokens: TokenValues, pairs: list[list[float]] | None, inputs: StepInputs
    ) -> list[RowLoss]:
        assert pairs is not None
        return answer_rows(tokens, pairs, inputs)
