"""Attention within documents by FlexAttention, for scores that are capped; on a GPU, compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
_COMPILED: Any = torch.compile(flex_attention, dynamic=False)  # where layers are not


def block_mask(first: Tensor, last: Tensor, keys: int) -> BlockMask:
    """Return which blocks of keys each block of queries needs, from what each token sees.

    Args:
        first: [tokens] int64, the first key that each attends to; rising.
        last: likewise, that of the token itself.
        keys: how many there are.
    """
    tokens = first.shape[0]
    starts = torch.arange(0, tokens, BLOCK, device=first.device)
    ends = torch.clamp(starts + BLOCK, max=tokens) - 1
    numbers = torch.arange(-(-keys // BLOCK), device=first.device)
    lowest, highest = first[starts] // BLOCK, last[ends] // BLOCK  # of any query of a block
    whole_from = -(-first[ends] // BLOCK)  # from here, all queries see all keys,
    whole_to = (last[starts] + 1) // BLOCK  # up to here
    is_whole = (numbers >= whole_from.unsqueeze(1)) & (numbers < whole_to.unsqueeze(1))
    needed = (numbers >= lowest.unsqueeze(1)) & (numbers <= highest.unsqueeze(1))
    partial = _listed(needed & ~is_whole)
    return BlockMask.from_kv_blocks(
        *partial,
        *_listed(is_whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_sees(first, last),
        seq_lengths=(tokens, keys),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of true entries of each row, and their columns, first."""
    counts = blocks.sum(1, dtype=torch.int32)
    columns = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
    return counts[None, None], columns[None, None].contiguous()


def _sees(first: Tensor, last: Tensor) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= last[query]) & (key >= first[query])

    return sees


def flex_document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return [tokens, heads, value size]; see `document_attention`.

    Args:
        mask: what `block_mask` makes.
        softcap: scores are softcap * tanh(scores / softcap).
    """

    def capped(score: Tensor, *places: Any) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    run = flex_attention if torch.compiler.is_compiling() else _COMPILED
    output, auxiliary = run(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        assert auxiliary.lse is not None
        share = torch.sigmoid(auxiliary.lse - sinks.float().unsqueeze(1))
        output = (output * share.unsqueeze(-1)).to(query.dtype)
    return output[0].transpose(0, 1)
