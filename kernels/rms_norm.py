"""Root mean square normalization (B. Zhang and R. Sennrich, 2019, arXiv:1910.07467)."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
    triton: bool = False,
) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`, computed in float32 as transformers' modules do.

    Args:
        x: [..., columns]; weight: [columns].
        offset: added to the weight; Gemma's weights are held less 1.
        rounds_first: the normalized x is rounded to its type before it meets the weight, and the
            result has the wider of both types, as Llama has it. Else only the result is rounded, to
            the type of x, as in Gemma and OLMo 2.
        triton: one kernel forward and one backward; a weight that needs no gradient costs none.
    """
    if triton:
        from headrace.kernels.rms_norm_triton import rms_norm_rows  # Triton is for GPUs only

        return rms_norm_rows(x, weight, eps, offset, rounds_first)
    return rms_norm_reference(x, weight, eps, offset=offset, rounds_first=rounds_first)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> Tensor:
    """The same in plain torch: the twin that tests compare with. float64 stays what it is."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (weight + offset if offset else weight) * normed.to(x.dtype)
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
