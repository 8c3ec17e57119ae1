"""Contrastive preference optimization: DPO without a reference (https://arxiv.org/abs/2401.08417)."""

import torch

from headrace.trainer.objectives.objective import PairObjective
from headrace.trainer.objectives.pairs import Answers, smoothed_sigmoid
from headrace.trainer.stage.micro_batch import PairLosses


class Cpo(PairObjective):
    """A loss of both rewards, beta times log-probabilities; those of `"ipo"` by token."""

    def compare(self, chosen: Answers, rejected: Answers) -> PairLosses:
        config = self.config
        sides = (chosen, rejected)
        values = [side.log_probability for side in sides]
        if config.loss == "ipo":
            values = [side.log_probability / side.tokens for side in sides]
        rewards = [config.beta * value for value in values]
        margin = rewards[0] - rewards[1]
        if config.loss == "hinge":
            loss = torch.relu(1 - margin)
        elif config.loss == "ipo":
            loss = (values[0] - values[1] - 1 / (2 * config.beta)) ** 2
        else:
            loss = smoothed_sigmoid(margin, config.label_smoothing)
        return PairLosses(loss, rewards[0], rewards[1])
