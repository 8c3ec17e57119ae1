"""AdamW on bfloat16 weights that loses no small update: Kahan summation, in one pass over memory.

A bfloat16 weight of 1 does not change when 0.003 is added. The compensation keeps what rounding
took and adds it again with the next update (W. Kahan, 1965; for training Zamirai et al., 2020,
arXiv:2010.06192), so no float32 copy of the weights is needed: 10 bytes a weight with its gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamWStep:
    """What one step is the same for all weights. `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def first_correction(self) -> float:
        return 1 - self.beta1**self.step

    @property
    def second_correction(self) -> float:
        return 1 - self.beta2**self.step


def adamw_kahan_reference(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor,
    step: AdamWStep,
) -> None:
    """One step in place, in plain torch: computed in float32, stored in each tensor's own type."""
    g = gradient.float()
    first = torch.lerp(exp_avg.float(), g, 1 - step.beta1)
    second = torch.lerp(exp_avg_sq.float(), g.square(), 1 - step.beta2)
    root = second.sqrt() / math.sqrt(step.second_correction) + step.eps
    old = weight.float()
    change = (first / step.first_correction) / root + step.weight_decay * old
    wanted = compensation.float() - step.lr * change
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    weight.copy_(old + wanted)
    compensation.copy_(wanted - (weight.float() - old))
