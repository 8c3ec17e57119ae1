"""Features of pictures, and the ways in which they enter hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of the pictures of a micro-batch, and where they belong in its b * s tokens."""

    values: Tensor  # [n, hidden size]
    stacked: list[Tensor]  # the same, added after each of the first decoder layers
    places: Tensor  # [n] int64

    def insert(self, hidden: Tensor) -> Tensor:
        """Put features in the place of the placeholders' rows of [b, s, hidden size]."""
        return self._at_places(hidden, self.values)

    def add(self, hidden: Tensor, layer: int) -> Tensor:
        """Add the features of a decoder layer to its output, if it has any."""
        if layer >= len(self.stacked):
            return hidden
        rows = hidden.flatten(0, 1).index_select(0, self.places)
        return self._at_places(hidden, rows + self.stacked[layer].to(hidden.dtype))

    def spread(self, empty: Tensor) -> Tensor:
        """Return zeros of [b, s, layers, hidden size] with the features of each of the first
        decoder layers in place of their tokens'.
        """
        stacked = torch.stack(self.stacked, dim=1).to(empty.dtype)
        return empty.flatten(0, 1).index_copy(0, self.places, stacked).view_as(empty)

    def _at_places(self, hidden: Tensor, values: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1).index_copy(0, self.places, values.to(hidden.dtype))
        return flat.view_as(hidden)
