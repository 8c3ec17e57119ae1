"""Rotary position embedding of queries and keys (J. Su et al., 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotary(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn each pair of numbers (i, i + head size / 2) of a head by its token's angle.

    The gradient is turned back by the same angle, so nothing but the table is kept for it.

    Args:
        query: [b, s, heads, head size]; key: [b, s, key heads, head size], the same type.
        cosine, sine: [b, s, head size], both halves alike, as transformers makes them. They have no
            gradient.
        triton: one kernel for both; else as transformers computes it, where the halves may differ.

    Returns:
        Query and key, turned; new tensors, laid out as given.
    """
    if triton:
        from headrace.kernels.rotary_triton import rotary_tokens  # Triton is for GPUs only

        return rotary_tokens(query, key, cosine, sine)
    return rotary_reference(query, key, cosine, sine)


def rotary_reference(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the twin that tests compare with."""
    cosine, sine = cosine.unsqueeze(2), sine.unsqueeze(2)
    return _turn(query, cosine, sine), _turn(key, cosine, sine)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
