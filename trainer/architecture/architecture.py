"""A model laid out without memory: where its parts are, and how its layers are to be called."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from headrace.schemas.train.model_overrides import ModelOverrides
from headrace.trainer.architecture.families import Family
from headrace.trainer.architecture.router import Router
from headrace.trainer.families.alibi import Alibi
from headrace.trainer.families.streams import StreamLayout
from headrace.trainer.vision.families import VisionFamily

LENGTH_DEPENDENT_ROTARY = {"dynamic", "longrope"}


class OwnParameters(nn.Module):
    """The parameters that lie at a module itself, without the modules below it; they are shared."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_parameters"] = owner._parameters


@dataclass(frozen=True)
class Growth:
    """Growth of a model's vocabulary over that of its files."""

    rows: int  # of the embedding in the files
    tokens: tuple[int, ...]  # ids of the new tokens, of which some may have had rows to spare


@dataclass(frozen=True)
class Architecture:
    """Description of a model with this config that tells how to run it piece by piece."""

    family: Family
    config: Any  # transformers' config of the language model
    attention: str  # transformers' name of the implementation
    windows: list[int | None]  # by layer: tokens that attention reaches back, itself included, or
    # the chunks of a document that it stays in (`Chunk`)
    rotary_types: list[str | None]  # by layer: which rotary table, where there are several
    stateful: list[bool]  # by layer: whether it has a state beside, or in place of, attention
    router: Router | None
    stream: StreamLayout
    alibi: Alibi | None = None
    growth: Growth | None = None
    scored: bool = False  # its head gives one number, see `objectives/scored_model.py`
    overrides: ModelOverrides = field(default_factory=ModelOverrides)  # of its config.json
    vision: VisionFamily | None = None  # where the model is run with its vision tower
    whole: Any = None  # transformers' config of that model

    @property
    def model_config(self) -> Any:
        """Return transformers' config of the model that is laid out."""
        return self.config if self.vision is None else self.whole

    @property
    def model_class(self) -> Any:
        """Return transformers' class that lays a model out by `model_config`."""
        if self.scored:
            return AutoModelForSequenceClassification
        return AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText

    @property
    def stacked_layers(self) -> int:
        """Return the number of first decoder layers after which features of a tower are added."""
        stacks = self.vision is not None and self.vision.stacked
        return len(self.whole.vision_config.deepstack_visual_indexes) if stacks else 0

    @property
    def parts(self) -> list[str]:
        """List the paths of all parts that have weights, in order of use, each once."""
        tower = [] if self.vision is None else self.vision.paths
        return [*tower, *self.family.parts(self.layers)]

    def part(self, model: nn.Module, path: str, prefix: str = "") -> nn.Module:
        """Return the part of a model at one of the paths of `parts`.

        Args:
            prefix: before the model's own names.
        """
        part = model.get_submodule(prefix + path)
        shares = self.vision is not None and path == self.vision.body
        return OwnParameters(part) if shares else part

    @property
    def layers(self) -> int:
        """Return how many decoder layers the model has."""
        return len(self.windows)

    @property
    def tied(self) -> bool:
        """Return whether the head uses the embedding's weights."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    def attends(self) -> list[bool]:
        """Return of each layer whether it takes a mask of attention."""
        beside = self.family.states is not None and self.family.states.attends
        return [beside or not stateful for stateful in self.stateful]

    @property
    def keeps_float32(self) -> bool:
        """Return whether layers hand on hidden states in float32, whatever they compute in."""
        key = self.family.states.float32 if self.family.states is not None else None
        return bool(self.setting(key))

    @property
    def rotary_by_document(self) -> bool:
        """Return whether rotary frequencies depend on the length of the text."""
        return self.steady_rotary_tokens is not None

    @property
    def steady_rotary_tokens(self) -> int | None:
        """Tokens of a text up to which they do not; None if they never do."""
        settings = getattr(self.config, "rope_parameters", None) or {}
        tables = [table for table in settings.values() if isinstance(table, dict)] or [settings]
        key = "max_position_embeddings"
        found = [
            int(table.get(f"original_{key}") or getattr(self.config, key))
            for table in tables
            if table.get("rope_type") in LENGTH_DEPENDENT_ROTARY
        ]
        return min(found, default=None)

    @property
    def uses_chance(self) -> bool:
        """Return whether the model itself has dropout or adds noise in training."""
        return any(
            isinstance(value, int | float) and value > 0
            for key, value in self.config.to_dict().items()
            if any(word in key for word in ("drop", "jitter"))
        )

    @property
    def embedding_scale(self) -> float | None:
        """Factor of the embedding's rows; None where they are taken as they are."""
        root = self.setting(self.family.embedding_root)
        if root is not None:
            return float(torch.tensor(root**0.5, dtype=torch.bfloat16))
        return self.setting(self.family.embedding_multiplier)

    def setting(self, key: str | None, default: float | None = None) -> float | None:
        """A number of the config that the family's record names."""
        value = getattr(self.config, key, None) if key else None
        return default if value is None else float(value)
