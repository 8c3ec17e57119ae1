"""ORPO: the odds ratio of both answers, by their mean tokens (https://arxiv.org/abs/2403.07691)."""

import torch
from torch.nn import functional

from headrace.trainer.objectives.objective import PairObjective
from headrace.trainer.objectives.pairs import Answers
from headrace.trainer.stage.micro_batch import PairLosses

CERTAIN = -1e-7  # a mean log-probability above it has no odds


class Orpo(PairObjective):
    """-beta log sigmoid(log odds of the chosen answer - of the rejected one)."""

    def compare(self, chosen: Answers, rejected: Answers) -> PairLosses:
        beta = self.config.beta
        means = [side.log_probability / side.tokens for side in (chosen, rejected)]
        means = [mean.clamp(max=CERTAIN) for mean in means]
        odds = [mean - torch.log(-torch.expm1(mean)) for mean in means]
        loss = -beta * functional.logsigmoid(odds[0] - odds[1])
        return PairLosses(loss, beta * means[0], beta * means[1])
