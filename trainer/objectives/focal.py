"""Objectives that weigh tokens by how certain they are.

Source of focal and focal-star loss: https://arxiv.org/abs/1708.02002.
"""

import torch
from torch import Tensor

from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.trainer.objectives.objective import TokenObjective

# below it a token counts as certain: at 0 a power under 1 has an infinite slope
LEAST_LOSS = 1e-7


class WithGamma(TokenObjective):
    """A function of the cross-entropy and gamma."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        assert config.gamma is not None
        self.gamma = config.gamma

    def adjust(self, losses: Tensor) -> Tensor:
        adjusted = self.weigh(losses.clamp(min=LEAST_LOSS))
        return torch.where(losses > 0, adjusted, torch.zeros_like(losses))

    def weigh(self, losses: Tensor) -> Tensor:
        """Return the loss of each token, from a cross-entropy above 0."""
        raise NotImplementedError


class Focal(WithGamma):
    """-(1 - p)^gamma log p."""

    def weigh(self, losses: Tensor) -> Tensor:
        return (-torch.expm1(-losses)) ** self.gamma * losses


class InverseFocal(WithGamma):
    """-(1 + p)^gamma log p."""

    def weigh(self, losses: Tensor) -> Tensor:
        return (1 + torch.exp(-losses)) ** self.gamma * losses


class Exponentiated(WithGamma):
    """(-log p)^gamma / gamma."""

    def weigh(self, losses: Tensor) -> Tensor:
        return losses**self.gamma / self.gamma


class FocalStar(WithGamma):
    """Cross-entropy of gamma times the logits, over gamma."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.logit_factor = self.gamma

    def adjust(self, losses: Tensor) -> Tensor:
        return losses / self.gamma
