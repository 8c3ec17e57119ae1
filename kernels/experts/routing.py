"""Rows of tokens brought to the order of the experts that they are sent to, and back.

Both ways are lookups, and each is the other's gradient: nothing is added by atomic operations, and
nothing waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.on_accelerator import on_accelerator


@dataclass(frozen=True)
class Routing:
    """Pairs of a token and an expert, sorted by expert, those of one expert by token.

    Attributes:
        tokens: [pairs], the token of each.
        order: [pairs], the number of each in [tokens, experts of each].
        places: [tokens, experts of each], where in the sorted order each lies.
        experts: [pairs], the expert of each.
        offsets: [experts] int32, where the pairs of each expert end; those of none come after all.
    """

    tokens: Tensor
    order: Tensor
    places: Tensor
    experts: Tensor
    offsets: Tensor


def route(chosen: Tensor, experts: int) -> Routing:
    """Sort the pairs of tokens and experts.

    Args:
        chosen: [tokens, experts of each], numbers below `experts`; that number itself is none.
    """
    sorted_experts, order = torch.sort(chosen.flatten(), stable=True)
    numbers = torch.arange(experts, device=chosen.device, dtype=sorted_experts.dtype)
    offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    pairs = torch.arange(order.shape[0], device=order.device)
    places = torch.empty_like(order).scatter(0, order, pairs).view(chosen.shape)
    known = sorted_experts.clamp(max=experts - 1)
    return Routing(order // chosen.shape[1], order, places, known, offsets)


def gather_rows(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Return x[rows], [pairs, columns].

    Args:
        x: [tokens, columns]; rows: [pairs].
        places: [tokens, times], which of the pairs are of each token.
    """
    gathered: Tensor = _gather_rows(x, rows, places)
    return gathered


def sum_rows(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Return [tokens, columns]: the sum of each token's pairs, added up in float32.

    Args:
        x: [pairs, columns]; rows, places: see `gather_rows`.
    """
    total: Tensor = _sum_rows(x, rows, places)
    return total


@torch.library.custom_op("headrace::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    return x.index_select(0, rows)


@torch.library.custom_op("headrace::sum_rows", mutates_args=())
def _sum_rows(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    if places.shape[1] == 1:
        return x.index_select(0, places.flatten())
    if on_accelerator(x):
        from headrace.kernels.experts.routing_triton import sum_rows_pass

        return sum_rows_pass(x.contiguous(), places)
    return x[places].sum(dim=1)


@_gather_rows.register_fake
def _(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


@_sum_rows.register_fake
def _(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(places.shape[0], x.shape[1])


def _keep_numbers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _sum_rows(gradient, *ctx.saved_tensors), None, None


def _sum_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_rows(gradient, *ctx.saved_tensors), None, None


_gather_rows.register_autograd(_gather_gradient, setup_context=_keep_numbers)
_sum_rows.register_autograd(_sum_gradient, setup_context=_keep_numbers)
