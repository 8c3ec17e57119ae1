"""Kernels of flash-linear-attention (0.6) in place of the functions by which transformers' mixers
carry their state, told of documents and not found by transformers itself.

A mixer gets a subclass whose `forward` is transformers' own code with another function under the
name of the one that carries the state. Read against transformers 5.17 to 5.23.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from headrace.trainer import devices

PACKAGE = "fla"  # import name of flash-linear-attention
RESTART = "state_restarts"  # argument of mixers that reaches those functions

Bounds = Tensor | None  # [documents + 1] int32, where documents of one row start
Outcome = tuple[Tensor, None]  # as transformers' functions return it without a cache


@dataclass(frozen=True)
class Restarts:
    """Description of where kernels begin anew: at bounds in one row, or with each row."""

    bounds: Bounds


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: Bounds, g: Tensor, beta: Tensor, **_: Any
) -> Outcome:
    """Run gated delta nets: a decay for each head."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    mixed, _ = chunk_gated_delta_rule(
        query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds
    )
    return mixed, None


def kimi_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: Bounds, g: Tensor, beta: Tensor, **_: Any
) -> Outcome:
    """Run Kimi's delta attention: a decay for each number of a head."""
    from fla.ops.kda import chunk_kda

    mixed, _ = chunk_kda(
        query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds
    )
    return mixed, None


def state_space(
    states: Tensor,
    steps: Tensor,
    decays: Tensor,
    keys: Tensor,
    queries: Tensor,
    *,
    bounds: Bounds,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    **named: Any,
) -> Tensor:
    """Run Mamba 2's state space: linear attention without a scale, whose decay is of each head.

    Args:
        states: [b, s, heads, width].
        steps: [b, s, heads].
        decays: [heads], negative.
        keys, queries: [b, s, groups, width], shared by the heads of a group.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    steps = torch.nn.functional.softplus(steps.float() + dt_bias.float()).clamp(*dt_limit)
    heads = states.shape[2] // keys.shape[2]
    keys, queries = (each.repeat_interleave(heads, 2) for each in (keys, queries))
    values = (states * steps.unsqueeze(-1)).to(states.dtype)
    mixed, _ = chunk_simple_gla(
        queries, keys, values, g=decays.float() * steps, scale=1.0, cu_seqlens=bounds
    )
    skipped: Tensor = named["D"].unsqueeze(-1)
    found: Tensor = mixed + skipped * states
    return found


# transformers' function -> what runs in its place
KERNELS: Mapping[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": kimi_delta_rule,
    "mamba2_chunk_scan": state_space,
}


def has_kernels(device: torch.device) -> bool:
    """Return whether kernels run on a device."""
    return devices.is_accelerator(device) and find_spec(PACKAGE) is not None


def carries_by(kind: type, scan: str) -> bool:
    """Return whether a mixer's class carries its state by a function of this name."""
    return scan in plain_forward(kind).__code__.co_names


def plain_forward(kind: type) -> FunctionType:
    """Return a mixer's `forward`, without what transformers wraps around it."""
    found = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    assert isinstance(found, FunctionType)
    return found


@cache
def rebound(kind: Any) -> Any:
    """Return the subclass of a mixer's class whose state is carried by `choose`'s functions; the
    class itself where it has none of those that are known.
    """
    forward = plain_forward(kind)
    names = [name for name in KERNELS if name in forward.__code__.co_names]
    if not names:
        return kind
    own = {name: choose(forward.__globals__[name], KERNELS[name]) for name in names}
    code = FunctionType(
        forward.__code__,
        forward.__globals__ | own,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    code.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": code})


def without_kernels_on_cpus(model: nn.Module) -> nn.Module:
    """Let a model of transformers run on CPUs whatever kernels it has found, in place."""
    for part in model.modules():
        kind: Any = type(part)
        if rebound(kind) is not kind:
            part.__class__ = rebound(kind)
    return model


def choose(function: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs a kernel where documents are handed to it, and transformers' own
    elsewhere: on CPUs without any kernel that transformers may have found.
    """

    def run(states: Tensor, *others: Any, **named: Any) -> Any:
        restarts = named.pop(RESTART, None)
        if isinstance(restarts, Restarts):
            return kernel(states, *others, bounds=restarts.bounds, **named)
        plain = getattr(function, "__wrapped__", function)
        return (plain if states.device.type == "cpu" else function)(states, *others, **named)

    return run
