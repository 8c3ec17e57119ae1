"""Causal attention of rows without documents, or of their last tokens, by cuDNN.

Torch's cuDNN kernel is the fastest on rows that are one document, but knows neither sinks nor
queries that begin amid the keys. So these queries attend to as many last keys causally and to all
earlier ones without a mask; both results are joined by their sums of exponentials, to which sinks
add. The backward passes are the kernel's own, given the joined result and sum for their own.
"""

from typing import Any

import torch
from torch import Tensor

from headrace.kernels.on_accelerator import on_accelerator


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Return [b, heads, s, value size]: each token's attention to those before it, and itself.

    Args:
        query: [b, heads, s, size], of the last s tokens; half precision on a GPU.
        key: [b, key heads, keys, size]; value: [b, key heads, keys, value size].
        scale: of the scores.
        sinks: [heads], scores of a further key whose value is zero.
    """
    output: Tensor = _attend(query, key, value, scale, sinks)[0]
    return output


def row_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Return the same in plain torch."""
    scores = _scores(query, key, scale, causal=True)
    if sinks is not None:
        further = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, further], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return (shares @ _repeated(value, query.shape[1]).float()).to(query.dtype)


def _parts(query: Tensor, key: Tensor) -> list[tuple[slice, bool]]:
    """Return which keys a call of the kernel takes, and whether causally."""
    earlier = key.shape[2] - query.shape[2]
    own = (slice(earlier, None), True)
    return [(slice(0, earlier), False), own] if earlier else [own]


def _run(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output over all keys, or causally over as many; and the sums' logarithms."""
    if not on_accelerator(query):
        scores = _scores(query, key, scale, causal)
        total = scores.logsumexp(-1, keepdim=True)
        return torch.exp(scores - total) @ _repeated(value, query.shape[1]).float(), total
    output, total, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(query, key, value, None, True, 0.0, causal),  # no bias, sums too, no dropout
        scale=scale,
    )
    return output, total.view(*query.shape[:3], 1)


def _run_back(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, of results and sums joined with others'."""
    if on_accelerator(query):
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of no dropout
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(gradient, query, key, value, output, total, seed, seed, None, None, None),
            *(query.shape[2], key.shape[2], 0.0, causal),
            scale=scale,
        )
        return of_query, of_key, of_value
    heads, groups, given = query.shape[1], (key.shape[1], -1), gradient.float()
    shares = torch.exp(_scores(query, key, scale, causal) - total)
    along = given @ _repeated(value, heads).float().transpose(2, 3)
    mean = (given * output.float()).sum(-1, keepdim=True)
    scores = shares * (along - mean) * scale
    of_key = scores.transpose(2, 3) @ query.float()
    of_value = shares.transpose(2, 3) @ given
    sums = (x.unflatten(1, groups).sum(2) for x in (of_key, of_value))
    found = [x.to(query.dtype) for x in (scores @ _repeated(key, heads).float(), *sums)]
    return found[0], found[1], found[2]


def _repeated(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Return [b, heads, s, keys] float32, -inf where one of the last s tokens does not see."""
    scores = query.float() @ _repeated(key, query.shape[1]).float().transpose(2, 3) * scale
    if not causal:
        return scores
    seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device)
    return scores.masked_fill(~seen.tril(seen.shape[1] - seen.shape[0]), float("-inf"))


# Torch cannot look into these operators; `sinks` has its gradient from what they return.
@torch.library.custom_op("headrace::row_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output and, [b, heads, s, 1] float32, the logarithms of exponentials' sums."""
    outputs: list[Tensor] = []
    totals: list[Tensor] = []
    for keys, causal in _parts(query, key):
        output, total = _run(query, key[:, :, keys], value[:, :, keys], scale, causal)
        outputs.append(output)
        totals.append(total)
    whole = totals[0] if len(totals) == 1 else torch.logaddexp(*totals)
    if sinks is not None:
        whole = torch.logaddexp(whole, sinks.float().view(1, -1, 1, 1))
    elif len(totals) == 1:
        return outputs[0].to(query.dtype).contiguous(), whole.contiguous()
    shares = [part * torch.exp(total - whole) for part, total in zip(outputs, totals, strict=True)]
    return sum(shares[1:], shares[0]).to(query.dtype).contiguous(), whole.contiguous()


@torch.library.custom_op("headrace::row_attention_gradient", mutates_args=())
def _gradient(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    parts = [
        _run_back(gradient, query, key[:, :, keys], value[:, :, keys], output, total, scale, causal)
        for keys, causal in _parts(query, key)
    ]
    of_query, of_key, of_value = (list(x) for x in zip(*parts, strict=True))
    total_query = of_query[0] if len(parts) == 1 else of_query[0] + of_query[1]
    joined = [x[0] if len(parts) == 1 else torch.cat(x, dim=2) for x in (of_key, of_value)]
    found = [x.contiguous() for x in (total_query, *joined)]
    return found[0], found[1], found[2]


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    return output, query.new_empty(*query.shape[:3], 1, dtype=torch.float32)


@_gradient.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found = [part.new_empty(part.shape) for part in (query, key, value)]
    return found[0], found[1], found[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, sinks)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, value, output, total, sinks = ctx.saved_tensors
    found = _gradient(gradient.contiguous(), query, key, value, output, total, ctx.scale)
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[4]:
        mean = (gradient.float() * output.float()).sum(-1, keepdim=True)
        shares = torch.exp(sinks.float().view(1, -1, 1, 1) - total)
        of_sinks = -(shares * mean).sum((0, 2, 3)).to(sinks.dtype)
    return (*found, None, of_sinks)


_attend.register_autograd(_gradients, setup_context=_keep)
