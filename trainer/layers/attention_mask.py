"""Attention masks: earlier tokens of the same document, within the layer's window."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headrace.trainer.families.attention import Chunk
from headrace.trainer.layers.device import document_mask


def attention_masks(
    document_lengths: Sequence[Sequence[int]],
    windows: Iterable[int | None],
    device: torch.device,
    additive: torch.dtype | None = None,
    *,
    always: bool = False,
) -> dict[int | None, Tensor | None]:
    """One mask for each window.

    Args:
        document_lengths: [b] lengths that sum to s.
        windows: tokens that a token may see, itself included; None is all.
        additive: for attention that adds its mask to the scores: their type.
        always: make one of plain causal attention too.

    Returns:
        Window -> [b, 1, s, s], true where a token may attend, or 0 there and the type's least value
        elsewhere if additive. None stands for plain causal attention.
    """
    documents = document_mask(document_lengths, device)
    longest = max(max(lengths) for lengths in document_lengths)
    size = sum(document_lengths[0])
    masks: dict[int | None, Tensor | None] = {}
    for window in set(windows):
        mask = documents
        if isinstance(window, Chunk):
            mask = document_mask(window.documents(document_lengths), device)
        elif window is not None and window < longest:
            mask = _causal(size, device) if mask is None else mask
            mask = mask & ~_causal(size, device).tril(-window)
        if mask is None and (always or additive is not None):
            mask = _causal(size, device)
        if mask is not None and additive is not None:
            mask = additive_mask(mask, additive)
        masks[window] = mask
    return masks


def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, size, size, dtype=torch.bool, device=device).tril()


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an addend of the scores: 0 where `mask` is true, else the type's minimum."""
    least = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)
