"""Gradients of a step: summed over all copies of a weight, measured, clipped."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.messages import gather
from headrace.trainer.parallel import RankLayout


def reduce(built: BuiltStage, layout: RankLayout) -> float:
    """Sum gradients over all copies of the weights; return the norm of the whole model's."""
    sum_tied(built, layout)
    sum_over_copies([item.parameter for item in built.trained], layout)
    return global_norm(built, layout)


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


def sum_over_copies(parameters: Sequence[nn.Parameter], layout: RankLayout) -> None:
    """Sum each gradient over replicas and slices of rows, in one go.

    Losses are divided by the global token count already. A parameter that no rank has used, such
    as an expert without tokens, stays without a gradient and is not stepped, as with one rank.
    """
    if layout.copies == 1 or not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=layout.device)
    dist.all_reduce(used, group=layout.copies_group)
    handles = [
        dist.all_reduce(gradient_of(parameter), group=layout.copies_group, async_op=True)
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
    owned = [p.parameter.grad for p in built.trained if p.owned]
    parts = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in owned if g is not None]
    norms: list[float] = torch.stack(parts).tolist() if parts else []
    everyone = gather(norms, layout.pipeline_group)
    return math.sqrt(math.fsum(norm * norm for stage in everyone for norm in stage))


def clip(parameters: Sequence[nn.Parameter], norm: float, largest: float) -> None:
    """Scale all gradients down so that their norm is at most `largest`; 0 leaves them alone."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if gradients and largest and norm > largest:
        torch._foreach_mul_(gradients, largest / norm)
