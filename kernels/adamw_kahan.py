"""AdamW on bfloat16 weights that loses no small update: Kahan summation, in one pass over memory.

A bfloat16 weight of 1 does not change when 0.003 is added. The compensation keeps what rounding
took and adds it again with the next update (W. Kahan, 1965; for training Zamirai et al., 2020,
arXiv:2010.06192), so no float32 copy of the weights is needed: 10 bytes a weight with its gradient.

Moments and compensation change by less than bfloat16 holds, too: rounded to the nearest, a second
moment stays up to 20% below where it should be. They are rounded up or down by chance, by a hash of
step and place, so that they are right on average and the same in every run.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# a 32-bit integer hash (C. Wellons, "lowbias32", 2018, public domain), and what sets steps apart
HASH_STEP = 0x9E3779B9
HASH_ROUNDS = ((0x7FEB352D, 16), (0x846CA68B, 15))


@dataclass(frozen=True)
class AdamWStep:
    """Numbers of one optimizer step that are the same for all weights. `step` counts from 1."""

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
    new = (old + wanted).to(weight.dtype)
    chances = chance(weight.shape, step.step, weight.device)
    store(exp_avg, first, chances & 0xFFFF)
    store(exp_avg_sq, second, chances & 0xFFFF)
    store(compensation, wanted - (new.float() - old), chances >> 16)
    weight.copy_(new)


def chance(shape: torch.Size, step: int, device: torch.device) -> Tensor:
    """32 bits for each place, int64, that look random."""
    x = torch.arange(shape.numel(), device=device) ^ (step * HASH_STEP & 0xFFFFFFFF)
    for multiplier, shift in HASH_ROUNDS:
        x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
    return (x ^ x >> 16).view(shape)


def store(place: Tensor, values: Tensor, chances: Tensor) -> None:
    """Copy float32 values; to bfloat16, away from zero with the probability of what is cut off."""
    if place.dtype != torch.bfloat16:
        place.copy_(values)
        return
    bits = values.contiguous().view(torch.int32).to(torch.int64) + chances
    bits = (bits & 0xFFFFFFFF) >> 16 << 16
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    place.copy_(signed.to(torch.int32).view(torch.float32))
