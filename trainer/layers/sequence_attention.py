"""Attention over rows that several ranks share: heads are exchanged for tokens (Ulysses).

Each rank comes with its tokens of all heads, sees whole rows of its share of the heads, and leaves
with its tokens of all heads. So masks, documents' bounds, windows, sinks and soft-caps stay as they
are. Source: DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509. transformers 5.14 to 5.23.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from headrace.schemas.errors import ConfigError
from headrace.trainer.layers import document_attention
from headrace.trainer.layers.rotary_attention import RotaryAttention
from headrace.trainer.sequence_slice import SequenceSlice

PREFIX = "headrace_sequence_"  # before the name of the attention that each rank runs
PER_HEAD = "s_aux"  # sinks, [heads], as layers hand them on


class HeadShare:
    """An attention's module, as one that has this rank's heads alone."""

    def __init__(self, module: nn.Module, part: SequenceSlice, groups: int) -> None:
        self.module = module
        self.part = part
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return self.part.share(value, 0) if name == "sinks" else value


class SequenceAttention:
    """An attention of transformers' over the ranks that share rows.

    Args:
        inner: name of the attention that each of them runs.
    """

    def __init__(self, inner: str, part: SequenceSlice) -> None:
        self.inner = inner
        self.part = part

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' layers ask for it.

        Args:
            query: [b, heads, s / ranks, head size]; key, value: the same of key heads.
            attention_mask, others: of whole rows.

        Returns:
            [b, s / ranks, heads, head size].
        """
        part, heads = self.part, query.shape[1]
        check_heads(heads, part.ranks)
        repeats = part.ranks // math.gcd(part.ranks, key.shape[1])
        keys = [states.repeat_interleave(repeats, dim=1) for states in (key, value)]
        query, key, value = heads_for_tokens([query, *keys], part)
        if others.get(PER_HEAD) is not None:
            others[PER_HEAD] = part.share(others[PER_HEAD], 0)
        share = HeadShare(module, part, query.shape[1] // key.shape[1])
        output, _ = document_attention.attention_named(self.inner, module)(
            share, query, key, value, attention_mask, **others
        )
        return tokens_for_heads(output, part), None


def check_heads(heads: int, ranks: int) -> None:
    """Refuse heads that cannot be shared evenly.

    Raises:
        ConfigError: with the number of heads.
    """
    if heads % ranks:
        raise ConfigError(
            f"sequence_parallel = {ranks} does not divide the {heads} attention heads of the "
            "model; use a divisor of them"
        )


def heads_for_tokens(states: list[Tensor], part: SequenceSlice) -> list[Tensor]:
    """[b, heads, s / ranks, size] each to [b, heads / ranks, s, size], in one exchange."""
    split = [x.unflatten(1, (part.ranks, -1)).movedim(1, 0) for x in states]
    received = part.exchange(torch.cat([x.flatten(1) for x in split], dim=1))
    parts = received.split([x[0].numel() for x in split], dim=1)
    return [
        x.view(like.shape).movedim(0, 2).flatten(2, 3) for x, like in zip(parts, split, strict=True)
    ]


def tokens_for_heads(states: Tensor, part: SequenceSlice) -> Tensor:
    """[b, s, heads / ranks, size] back to [b, s / ranks, heads, size]."""
    split = states.unflatten(1, (part.ranks, -1)).movedim(1, 0)
    return part.exchange(split).movedim(0, 2).flatten(2, 3)


def share_rows(modules: Iterable[nn.Module], part: SequenceSlice) -> None:
    """Let the attention of all modules go over the ranks that share rows; in place."""
    if part.is_whole:
        return
    for module in modules:
        if isinstance(module, RotaryAttention):
            inner = getattr(module.attend, "name", document_attention.NAME)
            module.attend = SequenceAttention(inner, part)
            continue  # all others look their attention up by its name at each call
        config: Any = getattr(module, "config", None)
        inner = getattr(config, "_attn_implementation", None)
        if inner is not None and not inner.startswith(PREFIX):
            AttentionInterface.register(PREFIX + inner, SequenceAttention(inner, part))
            config._attn_implementation = PREFIX + inner
