"""Direct preference optimization (https://arxiv.org/abs/2305.18290) and losses of its margin.

Sources: hinge (SLiC) https://arxiv.org/abs/2305.10425, IPO https://arxiv.org/abs/2310.12036,
APO-zero https://arxiv.org/abs/2408.06266, label smoothing (conservative DPO)
https://ericmitchell.ai/cdpo.pdf.
"""

import torch

from headrace.trainer.objectives.objective import PairObjective
from headrace.trainer.objectives.pairs import Answers, log_ratios, smoothed_sigmoid
from headrace.trainer.stage.micro_batch import PairLosses


class Dpo(PairObjective):
    """A loss of the rewards of both answers, beta times the log ratio to the reference."""

    def compare(self, chosen: Answers, rejected: Answers) -> PairLosses:
        config = self.config
        ratios = [log_ratios(side) for side in (chosen, rejected)]
        rewards = [config.beta * ratio for ratio in ratios]
        margin = rewards[0] - rewards[1]
        if config.loss == "hinge":
            loss = torch.relu(1 - margin)
        elif config.loss == "ipo":
            by_token = ratios[0] / chosen.tokens - ratios[1] / rejected.tokens
            loss = (by_token - 1 / (2 * config.beta)) ** 2
        elif config.loss == "apo_zero":
            loss = torch.sigmoid(-rewards[0]) + torch.sigmoid(rewards[1])
        else:
            loss = smoothed_sigmoid(margin, config.label_smoothing)
        return PairLosses(loss, rewards[0], rewards[1])
