"""An objective: one object that is asked for the loss on the last stage and those of rows."""

import torch
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.objectives.pairs import Answers, sum_answers
from headrace.trainer.objectives.row_loss import RowLoss, TokenValues
from headrace.trainer.objectives.rows import pair_rows, token_rows
from headrace.trainer.stage.loss import LossInputs
from headrace.trainer.stage.micro_batch import PairLosses, StageOutput


class Objective:
    """One thing to minimize; the base class of all."""

    takes_teacher = False

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def loss(self, inputs: LossInputs) -> StageOutput:
        """Return the loss of a micro-batch on the last stage."""
        raise NotImplementedError

    def row_losses(
        self, tokens: TokenValues, pairs: list[list[float]] | None, inputs: StepInputs
    ) -> list[RowLoss]:
        """Return the losses of a replica's rows, from what its last stage gave for a step.

        Args:
            pairs: [n][3] loss, chosen and rejected reward of each pair, where rows are pairs.
        """
        raise NotImplementedError


class CrossEntropy(Objective):
    """Sum over tokens of their cross-entropy."""

    def loss(self, inputs: LossInputs) -> StageOutput:
        scale, statistics = inputs.micro_batch.loss_scale, inputs.statistics
        loss, losses = inputs.head.cross_entropy(
            inputs.hidden, inputs.labels, scale, inputs.seed, statistics
        )
        return StageOutput(loss, losses, statistics=statistics)

    def row_losses(
        self, tokens: TokenValues, pairs: list[list[float]] | None, inputs: StepInputs
    ) -> list[RowLoss]:
        return token_rows(tokens, inputs)


class TokenObjective(CrossEntropy):
    """Sum over tokens of another function of their cross-entropy."""

    logit_factor = 1.0  # multiplies the logits in the adjusted loss

    def adjust(self, losses: Tensor) -> Tensor:
        """Return the loss of each token.

        Args:
            losses: cross-entropy in nats of `logit_factor` times the logits, 0 where a token has no
                label.

        Returns:
            The same shape; 0 without gradient where `losses` is 0.
        """
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> StageOutput:
        factor = self.logit_factor
        if factor == 1.0:
            losses = inputs.token_losses()
            adjusted = self.adjust(losses)
        else:  # statistics are of the logits as they are
            adjusted = self.adjust(
                inputs.head.token_losses(inputs.hidden, inputs.labels, inputs.seed, factor)
            )
            with torch.no_grad():
                losses = inputs.token_losses()
        loss = adjusted.sum() * inputs.micro_batch.loss_scale
        return StageOutput(loss, losses.detach(), adjusted.detach(), statistics=inputs.statistics)


class PairObjective(Objective):
    """Mean over pairs of a comparison, and the chosen answers' cross-entropy beside it."""

    def compare(self, chosen: Answers, rejected: Answers) -> PairLosses:
        """Return the loss and the rewards of each pair."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> StageOutput:
        micro_batch, whole = inputs.micro_batch, inputs.head.sequence.join
        lengths = micro_batch.extras.pairs
        assert lengths is not None
        losses = inputs.token_losses()
        before = None if inputs.before is None else whole(inputs.before)
        answers = sum_answers(whole(losses), before, whole(inputs.labels) != IGNORED_LABEL, lengths)
        pairs = self.compare(*answers)
        chosen = losses[: len(lengths)].sum()  # a sum over no pairs has no gradient
        weight = self.config.chosen_weight * micro_batch.chosen_scale
        loss = pairs.loss.sum() * micro_batch.loss_scale + chosen * weight
        return StageOutput(
            loss, losses.detach(), pairs=pairs.detach(), statistics=inputs.statistics
        )

    def row_losses(
        self, tokens: TokenValues, pairs: list[list[float]] | None, inputs: StepInputs
    ) -> list[RowLoss]:
        assert pairs is not None
        return pair_rows(tokens, pairs, inputs, self.config.chosen_weight)
