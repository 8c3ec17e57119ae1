"""Attention within documents that lie end to end: causal, with windows and with sinks.

A GPU runs torch's FlashAttention 2, which takes the documents' bounds in place of a mask. It knows
no sinks. These add a number to each query's sum of exponentials, so that its result is made smaller
afterwards; the backward pass is the kernel's own, given this result and this sum for its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.on_accelerator import on_accelerator

HEAD_SIZES = range(8, 257, 8)  # that FlashAttention 2 has
BOTH_WAYS = -2  # a window: all tokens of the document, later ones too


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    key_bounds: Tensor | None = None,
    longest_keys: int | None = None,
) -> Tensor:
    """Return [tokens, heads, value size]: each token's attention to those before it, and itself.

    Args:
        query: [tokens, heads, size]; key: [keys, key heads, size]; half precision on a GPU.
        value: [keys, key heads, value size], at most size.
        bounds: [documents + 1] int32, where each document starts, and the number of tokens.
        longest: tokens of the longest document, or more.
        scale: of the scores.
        window: tokens that one attends to, itself included; None for all, `BOTH_WAYS` for later
            ones too.
        sinks: [heads], scores of a further key in every document, whose value is zero.
        key_bounds: [documents + 1] int32, where each document's keys start, if more keys are given
            than tokens: a document's last token is that of its last key.
        longest_keys: keys of the document that has most, or more.
    """
    key_bounds = bounds if key_bounds is None else key_bounds
    longest_keys = longest if longest_keys is None else longest_keys
    missing = query.shape[-1] - value.shape[-1]
    wide = functional.pad(value, (0, missing)) if missing else value
    reach = -1 if window is None else window
    places = (bounds, key_bounds, longest, longest_keys)
    output: Tensor = _attend(query, key, wide, *places, scale, reach, sinks)[0]
    return output[..., : value.shape[-1]] if missing else output


def document_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    key_bounds: Tensor | None = None,
) -> Tensor:
    """Return the same in plain torch, and with a soft-cap of the scores where there is one."""
    places = (bounds, bounds if key_bounds is None else key_bounds)
    scores = _scores(query, key, places, scale, -1 if window is None else window, softcap)
    if sinks is not None:
        further = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, further], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : key.shape[0]]
    value = _repeated(value, query.shape[1]).float()
    return torch.einsum("hqk,khd->qhd", shares, value).to(query.dtype)


def visible_keys(
    bounds: Tensor, key_bounds: Tensor, tokens: int, window: int
) -> tuple[Tensor, Tensor]:
    """Return the first and the last key that each token attends to, each [tokens] int64.

    Args:
        window: -1 is none.
    """
    places = torch.arange(tokens, device=bounds.device)
    document = torch.searchsorted(bounds, places, right=True) - 1
    if window == BOTH_WAYS:
        return key_bounds.long()[document], key_bounds.long()[document + 1] - 1
    last = places + (key_bounds - bounds)[document + 1]
    first = key_bounds.long()[document]
    return first if window < 0 else torch.maximum(first, last - window + 1), last


def _repeated(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def _scores(
    query: Tensor,
    key: Tensor,
    bounds: tuple[Tensor, Tensor],
    scale: float,
    window: int,
    softcap: float | None,
) -> Tensor:
    """Return [heads, tokens, keys] float32, with -inf where a token does not attend."""
    key = _repeated(key, query.shape[1]).float()
    scores = torch.einsum("qhd,khd->hqk", query.float() * scale, key)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(key.shape[0], device=query.device)
    first, last = visible_keys(*bounds, query.shape[0], window)
    seen = (places <= last.unsqueeze(1)) & (places >= first.unsqueeze(1))
    return scores.masked_fill(~seen, float("-inf"))


# Torch cannot look into these operators; `sinks` has its gradient from what they return.
@torch.library.custom_op("headrace::document_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
    window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and, [heads, tokens] float32, the logarithms of exponentials' sums."""
    if on_accelerator(query):
        output, total, *_ = torch.ops.aten._flash_attention_forward(
            *(query, key, value, bounds, key_bounds, longest, longest_keys),
            *(0.0, window == -1, False),  # dropout, plain causality, a mask for debugging
            scale=scale,
            **_reach(window),
        )
    else:
        output, total = _attend_reference(query, key, value, (bounds, key_bounds), scale, window)
    if sinks is None:
        return output.contiguous(), total
    whole = torch.logaddexp(total, sinks.float().unsqueeze(1))
    share = torch.exp(total - whole).t().unsqueeze(-1)
    return (output * share).to(query.dtype).contiguous(), whole


@torch.library.custom_op("headrace::document_attention_gradient", mutates_args=())
def _gradient(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    tensors = (gradient.contiguous(), query, key, value, output, total)
    if not on_accelerator(query):
        return _gradient_reference(*tensors, (bounds, key_bounds), scale, window)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout: there is none
    of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
        *(*tensors, bounds, key_bounds, longest, longest_keys, 0.0, window == -1, state, state),
        scale=scale,
        **_reach(window),
    )
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous()


def _reach(window: int) -> dict[str, int]:
    """Return the kernel's names for a window."""
    return {} if window < 0 else {"window_size_left": window - 1, "window_size_right": 0}


def _attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, bounds, scale, window, None)
    total = scores.logsumexp(dim=-1)
    shares = torch.exp(scores - total.unsqueeze(-1))
    wide = _repeated(value, query.shape[1]).float()
    output = torch.einsum("hqk,khd->qhd", shares, wide)
    return output.to(query.dtype).contiguous(), total


def _gradient_reference(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bounds: tuple[Tensor, Tensor],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kernel computes from output and sums, in plain torch."""
    heads, given = query.shape[1], gradient.float()
    shares = torch.exp(_scores(query, key, bounds, scale, window, None) - total.unsqueeze(-1))
    along = torch.einsum("qhd,khd->hqk", given, _repeated(value, heads).float())
    mean = (given * output.float()).sum(-1).t().unsqueeze(-1)
    scores = shares * (along - mean) * scale
    of_query = torch.einsum("hqk,khd->qhd", scores, _repeated(key, heads).float())
    of_key = torch.einsum("hqk,qhd->khd", scores, query.float())
    of_value = torch.einsum("hqk,qhd->khd", shares, given)
    groups = [x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (of_key, of_value)]
    found = [x.to(query.dtype).contiguous() for x in (of_query, *groups)]
    return found[0], found[1], found[2]


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
    window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    output = query.new_empty(query.shape)
    return output, query.new_empty(heads, tokens, dtype=torch.float32)


@_gradient.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    found = [part.new_empty(part.shape) for part in (query, key, value)]
    return found[0], found[1], found[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, key_bounds, *ctx.settings, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, key_bounds, sinks)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, value, output, total, bounds, key_bounds, sinks = ctx.saved_tensors
    tensors = (gradient, query, key, value, output, total, bounds, key_bounds)
    found = _gradient(*tensors, *ctx.settings)
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[9]:
        mean = (gradient.float() * output.float()).sum(-1)
        shares = torch.exp(sinks.float().unsqueeze(1) - total).t()
        of_sinks = -(shares * mean).sum(0).to(sinks.dtype)
    return (*found, *(None,) * 6, of_sinks)


_attend.register_autograd(_gradients, setup_context=_keep)
