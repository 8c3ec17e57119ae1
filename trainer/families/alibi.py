"""Families whose scores of attention have a bias by distance, in place of positions (ALiBi).

The bias of a key is its position times a slope of the head, which is the same up to a constant that
a softmax does not see. Read against transformers 5.23, whose own functions make the slopes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_biases
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_biases
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_biases

Biases = Callable[[Any, int, torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class Alibi:
    """Description of how a family's layers are given their biases.

    Attributes:
        biases: config, tokens, type and device -> [heads, 1, tokens].
        argument: of the layers, which want them as [rows * heads, 1, tokens].
        in_mask: they are in the mask as well.
        rows: path of the attention in a layer, which takes the biases of one row alone.
        hides: masks are true where a token may not attend.
    """

    biases: Biases
    argument: str
    in_mask: bool = False
    rows: str | None = None
    hides: bool = False


def of_bloom(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return BLOOM's biases, [heads, 1, tokens]."""
    return bloom_biases(torch.ones(1, tokens, device=device), config.n_head, dtype)


def of_falcon(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Falcon's biases as they are in its masks, [heads, 1, tokens]."""
    heads = config.num_attention_heads
    biases = falcon_biases(torch.ones(1, tokens, device=device), heads, dtype)
    return biases / math.sqrt(config.hidden_size // heads)


def of_mpt(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return MPT's biases, in float32 as its own, [heads, 1, tokens]."""
    biases: Tensor = mpt_biases(config.n_heads, tokens, device=device)
    return biases


# model_type in config.json -> record
ALIBI: Mapping[str, Alibi] = {
    "bloom": Alibi(of_bloom, "alibi"),
    "falcon": Alibi(of_falcon, "alibi", in_mask=True),
    "mpt": Alibi(of_mpt, "position_bias", rows="attn", hides=True),
}


def alibi_of(config: Any) -> Alibi | None:
    """Return how a model's layers get biases by distance; None where they have none."""
    if config.model_type == "falcon" and not config.alibi:
        return None
    return ALIBI.get(config.model_type)
