"""Dynamic fine-tuning: each token weighed by its probability (https://arxiv.org/abs/2508.05629)."""

import torch
from torch import Tensor

from headrace.trainer.objectives.objective import TokenObjective


class Dft(TokenObjective):
    """-p log p, with no gradient through the p in front."""

    def adjust(self, losses: Tensor) -> Tensor:
        return torch.exp(-losses.detach()) * losses
