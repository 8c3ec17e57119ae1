"""Biases of attention by distance (ALiBi), which begin anew at each document."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headrace.trainer.families.alibi import Alibi

Masks = Mapping[int | None, Any]


class DistanceBiases:
    """Biases of one family's layers.

    Args:
        config: of the language model.
        dtype: of the computation.
    """

    def __init__(self, alibi: Alibi, config: Any, dtype: torch.dtype) -> None:
        self.alibi = alibi
        self.config = config
        self.dtype = dtype

    def of_rows(self, positions: Tensor, tokens: int) -> Tensor:
        """Return the biases of b rows, [b, heads, 1, s].

        Args:
            positions: [b, s] in documents.
            tokens: of the longest document.
        """
        table = self.alibi.biases(self.config, tokens, self.dtype, positions.device)
        return table[:, 0, positions].transpose(0, 1).unsqueeze(2)

    def masks(self, masks: Masks, biases: Tensor) -> Masks:
        """Return additive masks as the layers want them."""
        return {window: self._mask(mask, biases) for window, mask in masks.items()}

    def _mask(self, mask: Any, biases: Tensor) -> Tensor:
        assert isinstance(mask, Tensor), "additive masks are always made"
        hidden = mask < 0
        if self.alibi.hides:
            return hidden
        if self.alibi.in_mask:
            return biases.masked_fill(hidden, torch.finfo(biases.dtype).min)
        return mask

    def arguments(self, biases: Tensor) -> dict[str, Tensor]:
        """Return what a layer is given beside its mask."""
        by_row = biases if self.alibi.rows else biases.flatten(0, 1)
        return {self.alibi.argument: by_row}


class RowByRow(nn.Module):
    """Base, before an attention's own class, that takes each row with biases of its own."""

    def forward(self, hidden_states: Tensor, position_bias: Tensor, **named: Any) -> Any:
        """Attend in each row alone.

        Args:
            position_bias: [b, heads, 1, s].
        """
        if named.get("past_key_values") is not None:  # rows that end together: biases of one
            return super().forward(hidden_states, position_bias=position_bias[0], **named)
        mask = named.pop("attention_mask")
        rows = [
            super(RowByRow, self).forward(
                hidden_states[row : row + 1],
                position_bias=position_bias[row],
                attention_mask=mask[min(row, len(mask) - 1)].unsqueeze(0),
                **named,
            )[0]
            for row in range(len(hidden_states))
        ]
        return torch.cat(rows), None


@cache
def taking_rows(kind: Any) -> Any:
    """Return the subclass of an attention's class that takes row by row."""
    return type(kind.__name__, (RowByRow, kind), {})


def take_rows(layer: nn.Module, alibi: Alibi | None) -> None:
    """Let a layer's attention take row by row, in place, where biases of several do not fit it."""
    if alibi is None or alibi.rows is None:
        return
    attention = layer.get_submodule(alibi.rows)
    if not isinstance(attention, RowByRow):
        kind: Any = type(attention)
        attention.__class__ = taking_rows(kind)
