"""Gradients of a step: summed over all copies of a weight, measured, clipped."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.messages import gather
from headrace.trainer.parallel import RankLayout


def reduce(built: BuiltStage, layout: RankLayout, scale: float = 1.0) -> float:
    """Sum gradients over all copies of the weights; return the norm of the whole model's.

    Args:
        scale: that the loss was multiplied by; the gradients are freed of it.
    """
    if scale != 1.0:
        unscale([item.parameter for item in built.trained], scale)
    sum_partial(built.trained, layout)
    sum_tied(built, layout)
    sum_over_copies([item.parameter for item in built.trained], layout)
    return global_norm(built, layout)


def unscale(parameters: Sequence[nn.Parameter], scale: float) -> None:
    """Divide all gradients by the scale of the loss."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, 1 / scale)


def sum_tied(built: BuiltStage, layout: RankLayout) -> None:
    """Give the tied embedding the sum of its gradients as embedding and as head."""
    if built.tied_copy is None:
        return
    gradient = gradient_of(built.tied_copy)
    if built.tied_head is None:
        dist.all_reduce(gradient, group=layout.tied_group)
        return
    gradient += gradient_of(built.tied_head)
    built.tied_head.grad = None


def sum_partial(trained: Sequence[TrainedParameter], layout: RankLayout) -> None:
    """Sum the gradients that ranks with parts of the weights have found in part.

    Those that each has found whole, of norms and routers, are the first rank's: kernels whose sums
    differ in their last bits from call to call would let the copies of a weight drift apart.
    """
    if layout.dims.tensor == 1:
        return
    partial = [item.parameter for item in trained if item.is_partial]
    sum_over(partial, layout.tensor_group, layout.device)
    alike = [item.parameter for item in trained if item.cut is None and not item.is_partial]
    handles = [
        dist.broadcast(parameter.grad, group=layout.tensor_group, group_src=0, async_op=True)
        for parameter in alike
        if parameter.grad is not None
    ]
    for handle in handles:
        handle.wait()


def sum_over_copies(parameters: Sequence[nn.Parameter], layout: RankLayout) -> None:
    """Sum each gradient over replicas and slices of rows.

    Losses are divided by the global token count already.
    """
    if layout.copies > 1:
        sum_over(parameters, layout.copies_group, layout.device)


def sum_over(parameters: Sequence[nn.Parameter], group: Any, device: torch.device) -> None:
    """Sum each gradient over the ranks of a group, in one go.

    A parameter that no rank has used, such as an expert without tokens, stays without a gradient
    and is not stepped, as with one rank.
    """
    if not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    dist.all_reduce(used, group=group)
    handles = [
        dist.all_reduce(gradient_of(parameter), group=group, async_op=True)
        for parameter, users in zip(parameters, used.tolist(), strict=True)
        if users
    ]
    for handle in handles:
        handle.wait()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros, which it then has, where nothing used it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def global_norm(built: BuiltStage, layout: RankLayout) -> float:
    """The norm of the whole model's gradient.

    Norms are taken tensor by tensor and added with one rounding (`math.fsum`), so the result is
    bitwise the same however the model is cut.
    """
    owned = [item for item in built.trained if item.owned and item.parameter.grad is not None]
    gradients = [gradient_of(item.parameter) for item in owned]
    parts = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    is_cut = torch.tensor([item.cut is not None for item in owned], device=layout.device)
    norms: list[float] = norms_of_whole(torch.stack(parts), is_cut, layout) if parts else []
    everyone = gather(norms, layout.pipeline_group)
    return math.sqrt(math.fsum(norm * norm for stage in everyone for norm in stage))


def norms_of_whole(norms: Tensor, is_cut: Tensor, layout: RankLayout) -> list[float]:
    """Return the norms of whole weights' gradients, from those of what this rank holds of them."""
    if layout.dims.tensor > 1:
        squares = norms.double().square()
        dist.all_reduce(squares, group=layout.tensor_group)
        norms = norms.double().where(~is_cut, squares.sqrt())
    return norms.tolist()


def clip(parameters: Sequence[nn.Parameter], norm: float, largest: float) -> None:
    """Scale all gradients down so that their norm is at most `largest`; 0 leaves them alone."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if gradients and largest and norm > largest:
        torch._foreach_mul_(gradients, largest / norm)
