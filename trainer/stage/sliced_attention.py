"""Attention over rows that come in slices: each sees the kept keys and values of those before it.

Masks and documents' bounds are those of a slice's queries and of all keys up to its end, so that
any attention of transformers' runs as it is. Read against transformers 5.14 to 5.23.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from headrace.trainer.layers import document_attention
from headrace.trainer.layers.rotary_attention import RotaryAttention
from headrace.trainer.row_slice import KeptKeys

PREFIX = "headrace_slices_"  # before the name of the attention that runs
HOLDER = "keys_in_use"  # attribute of attention modules


class KeysInUse:
    """Says to the attention of one layer which rows it is running on."""

    def __init__(self) -> None:
        self._now: tuple[KeptKeys, int, int] | None = None

    @contextmanager
    def of(self, kept: KeptKeys, start: int, tokens: int) -> Iterator[None]:
        """Let the layer's attention join a slice, from `start` on, to what is kept of its rows."""
        self._now = kept, start, tokens
        try:
            yield
        finally:
            self._now = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def join(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return keys and values of all tokens up to now; of whole rows, those that are given."""
        if self._now is None:
            return [key, value]
        kept, start, tokens = self._now
        return kept.join([key, value], start, tokens)


class SlicedAttention:
    """An attention of transformers' over slices of rows, registered under a name of its own.

    Args:
        inner: name of the attention that runs.
    """

    def __init__(self, inner: str) -> None:
        self.inner = inner
        self.name = PREFIX + inner
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' layers ask for it, [b, heads, slice, size] each.

        Args:
            attention_mask: of the slice's tokens, over all up to its end.
        """
        key, value = getattr(module, HOLDER).join(key, value)
        owner = getattr(module, "module", module)  # of a rank's share of the heads
        attend = document_attention.attention_named(self.inner, owner)
        output, _ = attend(module, query, key, value, attention_mask, **others)
        return output, None


def slice_rows(layers: Iterable[nn.Module]) -> None:
    """Let the attention of layers go over slices of rows; in place."""
    for layer in layers:
        holder = KeysInUse()
        for module in layer.modules():
            config: Any = getattr(module, "config", None)
            inner = getattr(config, "_attn_implementation", None)
            if isinstance(module, RotaryAttention):
                module.attend = SlicedAttention(document_attention.NAME)
            elif inner is None:
                continue
            elif not inner.startswith(PREFIX):
                config._attn_implementation = SlicedAttention(inner).name
            setattr(module, HOLDER, holder)


def keys_in_use(layer: nn.Module) -> KeysInUse | None:
    """Return what tells a layer's attention of its rows; None where they are not cut."""
    found = (getattr(module, HOLDER, None) for module in layer.modules())
    return next((holder for holder in found if holder is not None), None)
