"""Llama-Pro: new decoder blocks between the old ones, trained alone.

A new block is a copy of the one before it whose output projections are zero, so that it starts as
the identity. Source: https://arxiv.org/abs/2401.02415.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.families import Family
from headrace.trainer.families.attention import layer_count

FEWEST_OUTPUTS = 2  # of a block: its attention's and its MLP's
BY_NUMBER = ("mlp_only_layers", "moe_layers", "attn_layer_indices")


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

    def starts_at_zero(self, name: str, family: Family) -> bool:
        """Return whether a parameter is an output projection of a new block."""
        layer = re.sub(r"\.(weight|bias)$", "", name)
        return self.is_new(name, family.layers) and layer.rpartition(".")[2] in family.residual

    def is_new(self, name: str, layers: str) -> bool:
        """Return whether a parameter belongs to a new block."""
        return self._index(name, layers) in self.new

    def _index(self, name: str, layers: str) -> int | None:
        if not name.startswith(f"{layers}."):
            return None
        return int(name[len(layers) + 1 :].partition(".")[0])


class BlockTuning(TuningMethod):
    """New decoder blocks in a frozen model."""

    beside_hidden = False

    def __init__(
        self,
        config: AdapterConfig,
        architecture: Architecture,
        plain: nn.Module,
        model: str,
        seed: int,
    ) -> None:
        super().__init__(config, architecture, plain, model, seed)
        self.expansion = spread(
            architecture.config.num_hidden_layers - config.blocks, config.blocks
        )
        self._layers = architecture.family.layers

    @classmethod
    def reshape(cls, config: AdapterConfig, model_config: Any) -> Any:
        return expand(model_config, config.blocks)

    def install(self, model: nn.Module) -> nn.Module:
        self._check_outputs(model)
        for name, parameter in model.named_parameters():
            new = self.expansion.is_new(name, self._layers)
            parameter.requires_grad_(parameter.requires_grad and new)
        return model

    def _check_outputs(self, model: nn.Module) -> None:
        """Check that the outputs of a new block's attention and MLP are known, to start at zero.

        Raises:
            ConfigError: they are not, so that it would change what the model computes.
        """
        family, new = self.architecture.family, sorted(self.expansion.new)
        for name in [f"{family.layers}.{layer}" for layer in new]:
            found = {
                path.rpartition(".")[0]
                for path, _ in model.get_submodule(name).named_modules()
                if path.rpartition(".")[2] in family.residual
            }
            experts = any(part.endswith("experts") for part, _ in model.named_modules())
            if len(found) < FEWEST_OUTPUTS and not experts:
                raise ConfigError(
                    'adapter.kind = "blocks": it is not known which layers of '
                    f'{self.architecture.config.model_type} add to the hidden states; use "lora"'
                )

    def stored_name(self, name: str) -> str:
        return self.expansion.stored_name(name, self._layers)

    def starts_at_zero(self, name: str) -> bool:
        return self.expansion.starts_at_zero(name, self.architecture.family)


def expand(config: Any, blocks: int) -> Any:
    """Return the config of a model with new blocks, evenly spread.

    Raises:
        ConfigError: more new blocks than there are layers, or layers that differ by number.
    """
    layers = config.num_hidden_layers
    if blocks > layers:
        raise ConfigError(f"adapter.blocks = {blocks}: the model has {layers} layers; add fewer")
    for key in BY_NUMBER:
        if getattr(config, key, None):
            raise ConfigError(f"adapter.blocks: the model's layers differ by number ({key})")
    if layer_count(config) != layers:
        raise ConfigError(f"adapter.blocks: a layer of {config.model_type} counts as two")
    origin = spread(layers, blocks).origin
    expanded = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(expanded, key, [value[layer] for layer in origin])
    expanded.num_hidden_layers = len(origin)
    return expanded


def spread(layers: int, blocks: int) -> Expansion:
    """Return where the layers come from of a model whose new blocks are evenly spread.

    Args:
        layers: of the base model.
    """
    after = {layers * (number + 1) // blocks - 1 for number in range(blocks)}
    origin: list[int] = []
    new = set()
    for layer in range(layers):
        origin.append(layer)
        if layer in after:
            new.add(len(origin))
            origin.append(layer)
    return Expansion(origin, frozenset(new))
