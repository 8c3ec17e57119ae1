"""Layout of what passes from layer to layer, and so between stages.

In most models that is hidden states alone. In others there are several copies of them, inputs of
each layer that come from the embedding, features of a vision tower that are added after the first
layers of a later stage, and keys and values that later layers share. All of it is laid side by side
in one tensor, in which a token has `width` numbers. Read against transformers 5.23
(`kv_sharing_modes` of Gemma 3n and 4).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

STORE, REUSE = "store", "reuse"


@dataclass(frozen=True)
class SharedStates:
    """Description of the keys and values that layers of one kind share."""

    kind: str  # of the layers
    heads: int
    size: int  # of a head

    @property
    def width(self) -> int:
        """Return how many numbers a token's keys, or its values, are."""
        return self.heads * self.size


@dataclass(frozen=True)
class StreamLayout:
    """Description of what passes between stages for a token."""

    hidden: int
    copies: int = 1
    layers: int = 0  # that have inputs of their own
    per_layer: int = 0  # numbers of each of these
    stacked: int = 0  # first layers after which features of a tower are added
    shared: tuple[SharedStates, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Return whether hidden states alone pass."""
        return self == StreamLayout(self.hidden)

    @property
    def sizes(self) -> list[int]:
        """List the numbers of each part: copies, inputs of layers, features, keys and values of
        each kind.
        """
        states = [part.width for part in self.shared for _ in ("keys", "values")]
        own = [self.copies * self.hidden, self.layers * self.per_layer, self.stacked * self.hidden]
        return [*own, *states]

    @property
    def width(self) -> int:
        """Return how many numbers there are for a token in all."""
        return sum(self.sizes)


def stream_of(config: Any, layers: nn.Module) -> StreamLayout:
    """Return what passes between the stages of a model with these decoder layers."""
    per_layer = getattr(config, "hidden_size_per_layer_input", None) or 0
    return StreamLayout(
        config.hidden_size,
        copies=getattr(config, "altup_num_inputs", None) or 1,
        layers=config.num_hidden_layers if per_layer else 0,
        per_layer=per_layer,
        shared=tuple(
            shared_states(layer, kind)
            for layer, kind, mode in zip(
                layers.children(),
                getattr(config, "layer_types", None) or (),
                modes_of(config),
                strict=False,
            )
            if mode == STORE
        ),
    )


def modes_of(config: Any) -> list[str | None]:
    """Return of each layer whether it stores or takes over keys and values, or neither."""
    return list(getattr(config, "kv_sharing_modes", None) or ())


def shared_states(layer: Any, kind: str) -> SharedStates:
    """Return the sizes of what a layer stores."""
    attention = layer.self_attn
    size = int(attention.head_dim)
    return SharedStates(kind, int(attention.k_proj.out_features) // size, size)
