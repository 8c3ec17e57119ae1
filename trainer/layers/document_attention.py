"""Attention within the documents of packed rows, without a mask: an attention of transformers.

In place of a mask of s x s, layers are given the documents' bounds and their window, and hand them
on as they would a mask. By what an H200 measured (docs/performance.md): rows of single documents
without a window go to cuDNN, through torch's `scaled_dot_product_attention` or, with sinks and in
slices, by `row_attention`; soft-caps to FlexAttention, and all else to FlashAttention 2.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headrace.kernels.attention.document_attention import (
    HEAD_SIZES,
    document_attention,
    document_attention_reference,
    visible_keys,
)
from headrace.kernels.attention.flex_attention import block_mask, flex_document_attention
from headrace.kernels.attention.row_attention import row_attention
from headrace.schemas.errors import ConfigError
from headrace.trainer import devices
from headrace.trainer.families.attention import Chunk
from headrace.trainer.layers.device import to_device
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice

Attend = Callable[..., tuple[Tensor, Tensor | None]]
NAME = "headrace_documents"


@dataclass(frozen=True)
class VisibleTokens:
    """Bounds in a mask's place: a token sees itself and those before it of its document.

    Attributes:
        bounds: [documents + 1] int32, where each document of a micro-batch starts, its rows laid
            end to end.
        window: tokens that one attends to, itself included; None for all.
        blocks: the same for FlexAttention, if it is to run.
        by_rows: all rows are one document each, without a window, and cuDNN is to run.
        key_bounds: the same as `bounds`, of keys, where rows come in slices: a slice's last token
            of a document attends to its last key up to there.
        first_keys: [b] then: the first key of each row that the slice attends to.
    """

    bounds: Tensor
    window: int | None = None
    blocks: BlockMask | None = None
    key_bounds: Tensor | None = None
    first_keys: tuple[int, ...] | None = None
    by_rows: bool = False


def fits(model_config: Any) -> bool:
    """Return whether the kernels support the model's attention; other models are given a mask."""
    sizes = {
        value
        for key, value in vars(model_config).items()
        if key.endswith("head_dim") and not key.startswith("linear_") and isinstance(value, int)
    }
    if not sizes and getattr(model_config, "num_attention_heads", None) is None:
        return False  # a model without attention
    if not sizes:
        sizes = {model_config.hidden_size // model_config.num_attention_heads}
    latent = [getattr(model_config, f"qk_{part}_head_dim", 0) or 0 for part in ("nope", "rope")]
    dropout = getattr(model_config, "attention_dropout", 0.0)
    return all(size in HEAD_SIZES for size in sizes | {sum(latent) or 8}) and not dropout


def visible_tokens(
    document_lengths: Sequence[Sequence[int]],
    windows: Iterable[int | None],
    device: torch.device,
    *,
    in_blocks: bool = False,
    groups: Tensor | None = None,
    by_rows: bool = False,
    rows: RowSlice = WHOLE_ROWS,
) -> dict[int | None, VisibleTokens | None]:
    """One object for each window, for compiled code that takes any number of documents.

    Args:
        document_lengths: [b] lengths that sum to s.
        in_blocks: FlexAttention is to run, which needs to know of blocks, on a GPU.
        groups: [b, s] of tokens that see each other both ways, -1 for none; with `in_blocks` alone.
        by_rows: not on rows that are one document each.
        rows: the slice that attends, to all up to its end.

    Returns:
        Window -> what is visible; None for plain causal attention.
    """
    size = sum(document_lengths[0])
    start, end = rows.bounds(size)
    pieces = [pieces_of(lengths, start, end) for lengths in document_lengths]
    flat = [piece for row in pieces for piece in row]
    bounds = ends_of([piece.queries for piece in flat], device)
    key_bounds, first_keys = bounds, None
    if start:
        key_bounds = ends_of([piece.keys for piece in flat], device)
        first_keys = tuple(end - sum(piece.keys for piece in row) for row in pieces)
    single = all(len(lengths) == 1 for lengths in document_lengths)
    found: dict[int | None, VisibleTokens | None] = {}
    for given in set(windows):
        if isinstance(given, Chunk):
            chunks = given.documents(document_lengths)
            found |= {
                given: visible_tokens(
                    chunks, [None], device, in_blocks=in_blocks, by_rows=by_rows, rows=rows
                )[None]
            }
            continue
        window = None if given is None or given >= end else given
        if single and window is None and not in_blocks and not start:
            found[given] = None
            continue
        blocks = None
        if in_blocks and devices.is_accelerator(device):
            sizes = ((end - start) * len(pieces), sum(piece.keys for piece in flat))
            blocks = blocks_of(bounds, key_bounds, sizes, window, groups)
        found[given] = VisibleTokens(
            bounds,
            window,
            blocks,
            key_bounds=key_bounds if first_keys is not None else None,
            first_keys=first_keys,
            by_rows=by_rows and single and window is None and groups is None,
        )
    return found


def blocks_of(
    bounds: Tensor,
    key_bounds: Tensor,
    sizes: tuple[int, int],
    window: int | None,
    groups: Tensor | None,
) -> BlockMask:
    """Return the blocks that FlexAttention goes over.

    Args:
        sizes: queries and keys.
    """
    queries, keys = sizes
    first, last = visible_keys(bounds, key_bounds, queries, window or -1)
    return block_mask(first, last if groups is None else last_of_groups(last, groups), keys)


def last_of_groups(last: Tensor, groups: Tensor) -> Tensor:
    """Return the last key that each token sees, if tokens of a group see all of it.

    Args:
        last: [b * s], without groups: that of the token itself.
        groups: [b, s], -1 for none; tokens of a group follow each other in a row.
    """
    size = groups.shape[1]
    starts = torch.arange(groups.shape[0], device=groups.device).unsqueeze(1) * size
    flat = torch.where(groups >= 0, groups + starts, -1).flatten()
    ends = torch.ones_like(flat, dtype=torch.bool)
    ends[:-1] = flat[1:] != flat[:-1]
    places = torch.arange(len(flat), device=flat.device)
    following = torch.where(ends, places, len(flat)).flip(0).cummin(0).values.flip(0)
    return torch.where(flat >= 0, following, last)


class Piece(NamedTuple):
    """A document's tokens in a slice of its row, and its tokens up to there."""

    queries: int
    keys: int


def pieces_of(lengths: Sequence[int], start: int, end: int) -> list[Piece]:
    """Return the pieces of a row's documents in a slice of it."""
    ends = list(accumulate(lengths))
    return [
        Piece(min(last, end) - max(last - length, start), min(last, end) - (last - length))
        for last, length in zip(ends, lengths, strict=True)
        if last > start and last - length < end and length
    ]


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return [lengths + 1] int32 bounds, whose number compiled code takes as it comes."""
    bounds = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    torch._dynamo.mark_dynamic(bounds, 0)
    return bounds


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleTokens | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        query: [b, heads, s, head size]; key, value: [b, key heads, s, head size], of rows in
            slices all up to the slice's end.
        attention_mask: a mask, which decides alone, or what is visible; None: all before.
        s_aux: [heads], sinks.
        softcap: scores are softcap * tanh(scores / softcap).

    Returns:
        [b, s, heads, head size].
    """
    if isinstance(attention_mask, Tensor):
        if s_aux is not None or softcap is not None:
            return attend_under_mask(
                query, key, value, attention_mask, scaling, s_aux, softcap
            ), None
        return _plain(module, query, key, value, attention_mask, dropout, scaling, others)
    if attention_mask is None and s_aux is None and softcap is None:
        return _plain(module, query, key, value, None, dropout, scaling, others)
    if others.get("position_bias") is not None:
        raise ConfigError('attention with a position bias needs masks; set kernels = "torch"')
    seen = every_row(query) if attention_mask is None else attention_mask
    b, _, s, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    if seen.by_rows and softcap is None:
        return row_attention(query, key, value, scale=scale, sinks=s_aux).transpose(1, 2), None
    query = query.transpose(1, 2).flatten(0, 1)
    longest = (s, key.shape[2])
    key, value = (end_to_end(states, seen.first_keys) for states in (key, value))
    output = within_documents(query, key, value, seen, longest, scale, s_aux, softcap)
    return output.unflatten(0, (b, s)), None


def end_to_end(states: Tensor, first: tuple[int, ...] | None) -> Tensor:
    """[b, heads, s, size] to [tokens, heads, size], of each row from its first one on."""
    states = states.transpose(1, 2)
    if first is None:
        return states.flatten(0, 1)
    rows = [row[start:] for row, start in zip(states, first, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def within_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: VisibleTokens,
    longest: tuple[int, int],
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return [tokens, heads, value size]; see `document_attention` for the arguments.

    Args:
        longest: tokens and keys of the longest document, or more.
    """
    bounds, key_bounds, window = seen.bounds, seen.key_bounds, seen.window
    if seen.blocks is not None:
        return flex_document_attention(
            query, key, value, seen.blocks, scale=scale, sinks=sinks, softcap=softcap
        )
    if softcap is None:
        return document_attention(
            *(query, key, value, bounds, longest[0]),
            scale=scale,
            window=window,
            sinks=sinks,
            key_bounds=key_bounds,
            longest_keys=longest[1],
        )
    return document_attention_reference(
        *(query, key, value, bounds),
        scale=scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
        key_bounds=key_bounds,
    )


def every_row(query: Tensor) -> VisibleTokens:
    """Return the bounds of rows that are one document each; query is [b, heads, s, size]."""
    rows, _, size, _ = query.shape
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * size
    return VisibleTokens(starts)


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
    )
    return output, None


def attend_under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return attention with sinks or a soft-cap under a mask, as generation gives one.

    Args:
        mask: [b, 1, s, keys], true where a token attends, or added to the scores.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    addend = mask
    if mask.dtype == torch.bool:
        addend = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    scores = scores + addend
    if sinks is not None:
        further = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, further], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (shares @ value).transpose(1, 2)


def attention_named(name: str, module: nn.Module) -> Attend:
    """Return an attention of transformers'; the eager one is in the file of the model's module."""
    if name == "eager":
        eager: Attend = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    found: Attend = AttentionInterface()[name]
    return found


AttentionInterface.register(NAME, attend)
