"""AdamW with Kahan summation, one pass, in Triton."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.adamw_kahan import HASH_STEP, AdamWStep

BLOCK = 2048
WARPS = 8


def adamw_kahan_pass(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor,
    step: AdamWStep,
) -> None:
    """See `adamw_kahan.adamw_kahan_reference`; all tensors contiguous and of one shape."""
    tensors = (weight, gradient, exp_avg, exp_avg_sq, compensation)
    assert all(tensor.is_contiguous() and tensor.shape == weight.shape for tensor in tensors)
    count = weight.numel()
    _step[(triton.cdiv(count, BLOCK),)](
        *tensors,
        count,
        step.lr,
        1 - step.beta1,
        1 - step.beta2,
        step.eps,
        step.weight_decay,
        1 / step.first_correction,
        1 / math.sqrt(step.second_correction),
        step.step * HASH_STEP & 0xFFFFFFFF,
        BY_CHANCE=exp_avg.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _step(
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    compensation,
    count,
    lr,
    first_rate,
    second_rate,
    eps,
    weight_decay,
    first_factor,
    root_factor,
    salt,
    BY_CHANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    old = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
    first = tl.load(exp_avg + at, inside, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + at, inside, other=0.0).to(tl.float32)
    lost = tl.load(compensation + at, inside, other=0.0).to(tl.float32)
    first += first_rate * (g - first)
    second += second_rate * (g * g - second)
    root = tl.sqrt(second) * root_factor + eps
    wanted = lost - lr * (first * first_factor / root + weight_decay * old)
    new = (old + wanted).to(weight.dtype.element_ty)
    lost = wanted - (new.to(tl.float32) - old)
    x = at.to(tl.uint32) ^ salt.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    tl.store(weight + at, new, inside)
    _store(exp_avg + at, first, x & 0xFFFF, inside, BY_CHANCE)
    _store(exp_avg_sq + at, second, x & 0xFFFF, inside, BY_CHANCE)
    _store(compensation + at, lost, x >> 16, inside, BY_CHANCE)


@triton.jit
def _store(place, values, chances, inside, BY_CHANCE: tl.constexpr):
    if BY_CHANCE:  # bfloat16 is the upper half of float32
        bits = values.to(tl.uint32, bitcast=True) + chances
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(place, values.to(place.dtype.element_ty), inside)
