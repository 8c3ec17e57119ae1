"""AdamW with Kahan summation, one pass, in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.adamw_kahan import AdamWStep

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
    tl.store(weight + at, new, inside)
    tl.store(exp_avg + at, first.to(exp_avg.dtype.element_ty), inside)
    tl.store(exp_avg_sq + at, second.to(exp_avg_sq.dtype.element_ty), inside)
    tl.store(compensation + at, lost.to(compensation.dtype.element_ty), inside)
