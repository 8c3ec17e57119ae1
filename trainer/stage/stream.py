"""Parts of the tensor that passes between stages, where it is more than hidden states."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headrace.trainer.families.streams import REUSE, STORE, StreamLayout, modes_of
from headrace.trainer.vision.features import Features

LEAST = 1e-5  # mean square by which a copy is divided at least
PER_LAYER, SHARED = "per_layer_input", "shared_kv_states"  # arguments of layers
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StreamParts:
    """Modules of the first stage and of the last, by `families.ends.Ends`."""

    rows: nn.Module | None = None
    rows_projection: nn.Module | None = None
    rows_norm: nn.Module | None = None
    copies_in: nn.Module | None = None
    copies_out: nn.Module | None = None


@dataclass
class Carried:
    """Values that layers are given, and give, beside hidden states.

    Args:
        modes: by number of a layer, what it does with keys and values.
        kinds: likewise, the kind that it shares them with.
        per_layer: [b, s, layers, size].
        stacked: [b, s, layers, hidden size], features of pictures, 0 at other tokens.
        shared: by kind, keys and values, [b, heads, s, size] each.
    """

    modes: list[str | None]
    kinds: list[str]
    per_layer: Tensor | None = None
    stacked: Tensor | None = None
    shared: dict[str, States] = field(default_factory=dict)

    def arguments(self, number: int) -> dict[str, Any]:
        """Return what a layer is given; what it stores comes into a dictionary of its own."""
        found: dict[str, Any] = {}
        if self.per_layer is not None:
            found[PER_LAYER] = self.per_layer[:, :, number]
        if self.modes:
            reuses = self.modes[number] == REUSE
            kind = self.kinds[number]
            found[SHARED] = {kind: self.shared[kind]} if reuses else {}
        return found

    def added(self, number: int, hidden: Tensor) -> Tensor:
        """Return a layer's output with the features that are added to it, if any."""
        if self.stacked is None or number >= self.stacked.shape[2]:
            return hidden
        return hidden + self.stacked[:, :, number]

    def take(self, number: int, arguments: dict[str, Any]) -> None:
        """Keep what a layer has stored."""
        if self.modes and self.modes[number] == STORE:
            self.shared |= arguments[SHARED]


class Stream:
    """Way from one tensor between stages to what layers are given, and back.

    Args:
        config: of the language model.
    """

    def __init__(self, layout: StreamLayout, parts: StreamParts, config: Any) -> None:
        self.layout = layout
        self.parts = parts
        self.modes = modes_of(config)
        self.kinds = list(getattr(config, "layer_types", None) or ()) if self.modes else []

    def begin(
        self, hidden: Tensor, ids: Tensor, features: Features | None = None
    ) -> tuple[Tensor, Carried]:
        """Return hidden states and what goes beside them, from the embedding's rows.

        Args:
            hidden: [b, s, hidden size].
            ids: [b, s].
            features: of pictures among the tokens.
        """
        carried = Carried(self.modes, self.kinds)
        if self.layout.is_plain:
            return hidden, carried
        if self.layout.layers:
            carried.per_layer = self._inputs_of_layers(hidden, ids.to(hidden.device))
        if self.layout.stacked:
            empty = hidden.new_zeros(*hidden.shape[:2], self.layout.stacked, hidden.shape[2])
            carried.stacked = empty if features is None else features.spread(empty)
        rows, tokens = hidden.shape[:2]
        for part in self.layout.shared:
            empty = hidden.new_zeros(rows, part.heads, tokens, part.size)
            carried.shared[part.kind] = (empty, empty)
        return self._spread(hidden), carried

    def _inputs_of_layers(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[b, s, layers, size]: rows of a table of their own, and a projection of the embedding."""
        parts, shape = self.parts, (self.layout.layers, self.layout.per_layer)
        assert parts.rows is not None and parts.rows_projection is not None
        assert parts.rows_norm is not None
        size = next(parts.rows.parameters()).shape[0]
        rows = parts.rows(torch.where(ids < size, ids, 0)).unflatten(-1, shape)
        projected = parts.rows_projection(hidden) * self.layout.hidden**-0.5
        inputs: Tensor = (parts.rows_norm(projected.unflatten(-1, shape)) + rows) * 2**-0.5
        return inputs.to(hidden.dtype)

    def _spread(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden size] to [copies, b, s, hidden size], where there are several."""
        if self.layout.copies == 1:
            return hidden
        assert isinstance(self.parts.copies_in, nn.ModuleList)
        others = [as_large(projection(hidden), hidden) for projection in self.parts.copies_in]
        return torch.stack([hidden, *others])

    def end(self, hidden: Tensor) -> Tensor:
        """Return the hidden states that the last norm is given: the mean of all copies."""
        if self.layout.copies == 1:
            return hidden
        assert isinstance(self.parts.copies_out, nn.ModuleList)
        first = hidden[0]
        pairs = zip(self.parts.copies_out, hidden[1:], strict=True)
        others = [as_large(projection(copy), first) for projection, copy in pairs]
        return torch.stack([first, *others]).mean(dim=0)

    def join(self, hidden: Tensor, carried: Carried) -> Tensor:
        """Return the tensor for the next stage, [b, s, width]."""
        if self.layout.is_plain:
            return hidden
        parts = [hidden if self.layout.copies == 1 else hidden.movedim(0, 2).flatten(2)]
        if carried.per_layer is not None:
            parts.append(carried.per_layer.flatten(2))
        if carried.stacked is not None:
            parts.append(carried.stacked.flatten(2))
        for part in self.layout.shared:
            parts += [states.transpose(1, 2).flatten(2) for states in carried.shared[part.kind]]
        return torch.cat([part.to(hidden.dtype) for part in parts], dim=-1)

    def split(self, inputs: Tensor) -> tuple[Tensor, Carried]:
        """Return hidden states and what goes beside them, from the tensor of the stage before."""
        carried, layout = Carried(self.modes, self.kinds), self.layout
        if layout.is_plain:
            return inputs, carried
        hidden, inputs_of_layers, features, *states = inputs.split(layout.sizes, dim=-1)
        if layout.layers:
            shape = (layout.layers, layout.per_layer)
            carried.per_layer = inputs_of_layers.unflatten(-1, shape)
        if layout.stacked:
            carried.stacked = features.unflatten(-1, (layout.stacked, layout.hidden))
        for number, part in enumerate(layout.shared):
            keys, values = (
                flat.unflatten(-1, (part.heads, part.size)).transpose(1, 2)
                for flat in states[2 * number : 2 * number + 2]
            )
            carried.shared[part.kind] = (keys, values)
        if layout.copies > 1:
            hidden = hidden.unflatten(-1, (layout.copies, layout.hidden)).movedim(2, 0)
        return hidden, carried


def as_large(states: Tensor, like: Tensor) -> Tensor:
    """Return states with the root mean square that others have."""
    wanted = like.pow(2).mean(dim=-1, keepdim=True).sqrt()
    there = states.pow(2).mean(dim=-1, keepdim=True).clamp(min=LEAST).sqrt()
    return states * wanted / there
