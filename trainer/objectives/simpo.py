"""SimPO: rewards by mean token, no reference, a margin to reach (https://arxiv.org/abs/2405.14734)."""

from headrace.trainer.objectives.objective import PairObjective
from headrace.trainer.objectives.pairs import Answers, smoothed_sigmoid
from headrace.trainer.stage.micro_batch import PairLosses


class SimPo(PairObjective):
    """-log sigmoid(beta * (mean log p of chosen tokens - of rejected ones) - gamma)."""

    def compare(self, chosen: Answers, rejected: Answers) -> PairLosses:
        config = self.config
        assert config.gamma is not None
        rewards = [config.beta * side.log_probability / side.tokens for side in (chosen, rejected)]
        margin = rewards[0] - rewards[1] - config.gamma
        loss = smoothed_sigmoid(margin, config.label_smoothing)
        return PairLosses(loss, rewards[0], rewards[1])
