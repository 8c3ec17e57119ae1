"""Attention masks: earlier tokens of the same document, within the layer's window."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headrace.trainer.families.attention import Chunk
from headrace.trainer.layers.device import document_mask
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice


def attention_masks(
    document_lengths: Sequence[Sequence[int]],
    windows: Iterable[int | None],
    device: torch.device,
    additive: torch.dtype | None = None,
    groups: Tensor | None = None,
    rows: RowSlice = WHOLE_ROWS,
    *,
    always: bool = False,
) -> dict[int | None, Tensor | None]:
    """One mask for each window.

    Args:
        document_lengths: [b] lengths that sum to s.
        windows: tokens that a token may see, itself included; None is all.
        additive: for attention that adds its mask to the scores: their type.
        groups: [b, s] of tokens that see each other both ways, -1 for none; of whole rows alone.
        rows: the slice that attends, to all up to its end.
        always: make one of plain causal attention too.

    Returns:
        Window -> [b, 1, s, s], true where a token may attend, or 0 there and the type's least value
        elsewhere if additive. None stands for plain causal attention.
    """
    bounds = rows.bounds(sum(document_lengths[0]))
    documents = document_mask(document_lengths, device, bounds)
    if documents is None and bounds[0]:
        documents = _causal(bounds, device)  # plain causality would be that of the first tokens
    longest = max(max(lengths) for lengths in document_lengths)
    masks: dict[int | None, Tensor | None] = {}
    if groups is not None:
        before = _causal(bounds, device) if documents is None else documents
        documents = before | in_one_group(groups)
    for window in set(windows):
        mask = documents
        if isinstance(window, Chunk):
            mask = document_mask(window.documents(document_lengths), device, bounds)
            if mask is None and bounds[0]:
                mask = _causal(bounds, device)
        elif window is not None and window < longest:
            mask = _causal(bounds, device) if mask is None else mask
            mask = mask & ~_causal(bounds, device).tril(bounds[0] - window)
        if mask is None and (always or additive is not None):
            mask = _causal(bounds, device)
        if mask is not None and additive is not None:
            mask = additive_mask(mask, additive)
        masks[window] = mask
    return masks


def in_one_group(groups: Tensor) -> Tensor:
    """[b, s] to [b, 1, s, s], true where both tokens are of one group."""
    same = groups.unsqueeze(2) == groups.unsqueeze(1)
    return (same & (groups >= 0).unsqueeze(1)).unsqueeze(1)


def _causal(bounds: tuple[int, int], device: torch.device) -> Tensor:
    start, end = bounds
    return torch.ones(1, 1, end - start, end, dtype=torch.bool, device=device).tril(start)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an addend of the scores: 0 where `mask` is true, else the type's minimum."""
    least = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)
