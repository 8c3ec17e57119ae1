"""Gradients of a step: summed over all copies of a weight, measured, clipped."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.messages import gather
from headrace.trainer.optim.sharded import ShardedOptimizer, share_of
from headrace.trainer.optim.sums import gradient_of, sum_over
from headrace.trainer.parallel import RankLayout


def reduce(
    built: BuiltStage, layout: RankLayout, optimizer: torch.optim.Optimizer, scale: float = 1.0
) -> float:
    """Sum gradients over all copies of the weights; return the norm of the whole model's.

    Where the optimizer shares its states out, a rank is given the sums of its shares alone.

    Args:
        scale: that the loss was multiplied by; the gradients are freed of it.
    """
    if scale != 1.0:
        unscale([item.parameter for item in built.trained], scale)
    sum_partial(built.trained, layout)
    sum_tied(built, layout)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.reduce_gradients()
    else:
        sum_over_copies([item.parameter for item in built.trained], layout)
    return global_norm(built, layout, optimizer)


def stepped(built: BuiltStage, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return what is stepped here: trained weights, or this rank's shares of them."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.parameters
    return [item.parameter for item in built.trained]


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


def global_norm(
    built: BuiltStage, layout: RankLayout, optimizer: torch.optim.Optimizer | None = None
) -> float:
    """The norm of the whole model's gradient.

    Norms are taken tensor by tensor and added with one rounding (`math.fsum`), so the result is
    bitwise the same however the model is cut into stages. Of copies, each takes its share of every
    tensor, whether the optimizer's states are shared out or not.
    """
    found = [(item, own_gradient(item, layout, optimizer)) for item in built.trained if item.owned]
    parts = [
        torch.linalg.vector_norm(gradient, dtype=torch.float32)
        for _, gradient in found
        if gradient is not None
    ]
    cuts = [item.cut is not None for item, gradient in found if gradient is not None]
    is_cut = torch.tensor(cuts, device=layout.device)
    norms: list[float] = norms_of_whole(torch.stack(parts), is_cut, layout) if parts else []
    everyone = gather(norms, layout.pipeline_group)
    return math.sqrt(math.fsum(norm * norm for stage in everyone for norm in stage))


def own_gradient(
    item: TrainedParameter, layout: RankLayout, optimizer: torch.optim.Optimizer | None
) -> Tensor | None:
    """Return this rank's share of a gradient, which copies have summed; None where none has one."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.gradient_of(item.parameter)
    gradient = item.parameter.grad
    if gradient is None or layout.copies == 1:
        return gradient
    rank, ranks = dist.get_rank(layout.copies_group), layout.copies
    start, size = share_of(gradient.numel(), rank, ranks)
    return gradient.reshape(-1)[start : start + size]


def norms_of_whole(norms: Tensor, is_cut: Tensor, layout: RankLayout) -> list[float]:
    """Return the norms of whole weights' gradients, from those of what this rank holds of them."""
    if layout.copies > 1:
        squares = norms.double().square()
        dist.all_reduce(squares, group=layout.copies_group)
        norms = squares.sqrt()
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
