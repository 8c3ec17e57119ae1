"""Losses of tokens that are functions of their cross-entropy."""

import torch
from torch import Tensor

from headrace.schemas.objective_config import ObjectiveConfig

# below it a token counts as certain: at 0 a power under 1 has an infinite slope
LEAST_LOSS = 1e-7


def adjusted_losses(losses: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The objective's loss of each token.

    Args:
        losses: cross-entropy in nats, 0 where a token has no label; for `"focal_star"` that of
            gamma times the logits.

    Returns:
        The same shape; 0 without gradient where `losses` is 0.

    Sources: focal and focal-star loss https://arxiv.org/abs/1708.02002.
    """
    gamma = objective.gamma
    assert gamma is not None
    if objective.kind == "focal_star":
        return losses / gamma
    certain = losses.clamp(min=LEAST_LOSS)
    if objective.kind == "focal":
        adjusted = (-torch.expm1(-certain)) ** gamma * certain
    elif objective.kind == "inverse_focal":
        adjusted = (1 + torch.exp(-certain)) ** gamma * certain
    else:
        adjusted = certain**gamma / gamma
    return torch.where(losses > 0, adjusted, torch.zeros_like(losses))


def logit_factor(objective: ObjectiveConfig) -> float:
    """Return the factor that multiplies the logits in the adjusted loss."""
    if objective.kind != "focal_star":
        return 1.0
    assert objective.gamma is not None
    return objective.gamma
