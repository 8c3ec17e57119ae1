"""Gradients summed over ranks that have found parts of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over(parameters: Sequence[nn.Parameter], group: Any, device: torch.device) -> None:
    """Sum each gradient over the ranks of a group, in one go.

    A parameter that no rank has used, such as an expert without tokens, stays without a gradient
    and is not stepped, as with one rank.
    """
    handles = [
        dist.all_reduce(gradient_of(parameter), group=group, async_op=True)
        for parameter in used_by_any(parameters, group, device)
    ]
    for handle in handles:
        handle.wait()


def used_by_any(
    parameters: Sequence[nn.Parameter], group: Any, device: torch.device
) -> list[nn.Parameter]:
    """Return the parameters that have a gradient at any rank of a group."""
    if not parameters:
        return []
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    dist.all_reduce(used, group=group)
    return [p for p, users in zip(parameters, used.tolist(), strict=True) if users]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros, which it then has, where nothing used it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
