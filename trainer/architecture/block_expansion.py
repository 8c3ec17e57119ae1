"""Llama-Pro: new decoder blocks between the old ones, trained alone.

A new block is a copy of the one before it whose output projections are zero, so that it starts as
the identity. Source: https://arxiv.org/abs/2401.02415.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from headrace.schemas.errors import ConfigError

OUTPUT_PROJECTION = re.compile(
    r"\.(o_proj|down_proj|dense|dense_4h_to_h|fc2|c_proj)(\.weight|\.bias)?$"
)


@dataclass(frozen=True)
class Expansion:
    """Map from each layer of the expanded model to the layer of the base model that it copies."""

    origin: list[int]
    new: frozenset[int]  # numbers of the new blocks in the expanded model

    def stored_name(self, name: str, layers: str) -> str:
        """The base model's name for a parameter of the expanded model.

        Args:
            layers: path of the list of decoder layers.
        """
        index = self._index(name, layers)
        if index is None:
            return name
        return name.replace(f"{layers}.{index}.", f"{layers}.{self.origin[index]}.", 1)

    def starts_at_zero(self, name: str, layers: str) -> bool:
        """Return whether a parameter is an output projection of a new block."""
        return self.is_new(name, layers) and OUTPUT_PROJECTION.search(name) is not None

    def is_new(self, name: str, layers: str) -> bool:
        """Return whether a parameter belongs to a new block."""
        return self._index(name, layers) in self.new

    def _index(self, name: str, layers: str) -> int | None:
        if not name.startswith(f"{layers}."):
            return None
        return int(name[len(layers) + 1 :].partition(".")[0])


def expand(config: Any, blocks: int) -> tuple[Any, Expansion]:
    """The config of a model with new blocks, evenly spread, and where its layers come from.

    Raises:
        ConfigError: more new blocks than there are layers, or layers that differ by number.
    """
    layers = config.num_hidden_layers
    if blocks > layers:
        raise ConfigError(f"adapter.blocks = {blocks}: the model has {layers} layers; add fewer")
    if getattr(config, "mlp_only_layers", None):
        raise ConfigError("adapter.blocks: the model's layers differ by number (mlp_only_layers)")
    after = {layers * (number + 1) // blocks - 1 for number in range(blocks)}
    origin: list[int] = []
    new = set()
    for layer in range(layers):
        origin.append(layer)
        if layer in after:
            new.add(len(origin))
            origin.append(layer)
    expanded = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(expanded, key, [value[layer] for layer in origin])
    expanded.num_hidden_layers = len(origin)
    return expanded, Expansion(origin, frozenset(new))
