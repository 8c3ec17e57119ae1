"""Gradients of a step: summed over replicas and tied copies, measured, clipped."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.model.model_builder import BuiltStage


def sum_tied(built: BuiltStage, layout: Layout) -> None:
    """Give the tied embedding the sum of its gradients as embedding and as head."""
    if built.tied_copy is None:
        return
    if built.tied_head is None:
        dist.all_reduce(built.tied_copy.grad, group=layout.tied_group)
        return
    assert built.tied_copy.grad is not None and built.tied_head.grad is not None
    built.tied_copy.grad += built.tied_head.grad
    built.tied_head.grad = None


def sum_over_replicas(parameters: Sequence[nn.Parameter], layout: Layout) -> None:
    """Sum each gradient over the replicas; losses are divided by the global token count already."""
    if layout.replicas == 1:
        return
    handles = [
        dist.all_reduce(parameter.grad, group=layout.replicas_group, async_op=True)
        for parameter in parameters
    ]
    for handle in handles:
        handle.wait()


def global_norm(built: BuiltStage, layout: Layout) -> float:
    """The norm of the whole model's gradient.

    Norms are taken tensor by tensor and added with one rounding (`math.fsum`), so the result is
    bitwise the same however the model is cut.
    """
    owned = [p.parameter.grad for p in built.trained if p.owned]
    norms: list[float] = []
    if owned:
        norms = torch.stack(
            [torch.linalg.vector_norm(g, dtype=torch.float32) for g in owned]
        ).tolist()
    everyone = gather_objects(norms, layout.pipeline_group)
    return math.sqrt(math.fsum(norm * norm for stage in everyone for norm in stage))


def clip(parameters: Sequence[nn.Parameter], norm: float, largest: float) -> None:
    """Scale all gradients down so that their norm is at most `largest`; 0 leaves them alone."""
    if largest and norm > largest:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, largest / norm)
