"""A model's config with the settings that `[model_overrides]` puts in place of its own."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.shards.tokenizer_content import known_tokens, with_tokens
from headrace.schemas.train.model_overrides import ORIGINAL, ModelOverrides, RopeScaling
from headrace.trainer.architecture.architecture import Architecture, Growth
from headrace.trainer.architecture.read_architecture import architecture_of

TOKENIZER_NAME = "tokenizer.json"
KEPT = ("rope_theta", "partial_rotary_factor")  # of the rotary settings there are
POSITIONS = "max_position_embeddings"
WITH_ORIGINAL = ("yarn", "longrope", "llama3")


def overridden(architecture: Architecture, overrides: ModelOverrides, path: str) -> Architecture:
    """Return the architecture that a model has with other settings; `path` is for messages.

    Raises:
        ConfigError: it has no such settings.
    """
    if overrides == ModelOverrides():
        return architecture
    values = with_overrides(architecture.config.to_dict(), overrides, path)
    if architecture.family.rotary is None and positions_differ(overrides):
        raise ConfigError(
            f"model_overrides: {path} has no rotary positions; drop max_position_embeddings and "
            "rope_scaling"
        )
    config = type(architecture.config).from_dict(values)
    growth = None
    if overrides.new_tokens and architecture.family.ends.rows is not None:
        raise ConfigError(
            f"model_overrides.new_tokens: {path} has embeddings of its own for each layer, which "
            "do not grow; leave new tokens out"
        )
    if overrides.new_tokens:
        ids = new_ids(overrides.new_tokens, Path(path))
        growth = Growth(architecture.config.vocab_size, tuple(ids))
    return replace(architecture_of(config, path), overrides=overrides, growth=growth)


def new_ids(tokens: Sequence[str], directory: Path) -> list[int]:
    """Return the ids of new tokens in a model's tokenizer.

    Raises:
        ConfigError: it has none, or has one of them.
    """
    path = directory / TOKENIZER_NAME
    if not path.is_file():
        raise ConfigError(f"model_overrides.new_tokens: {path} not found; new tokens need one")
    content = path.read_bytes()
    there = known_tokens(content, tokens)
    if there:
        raise ConfigError(
            f'model_overrides.new_tokens: "{there[0]}" is a token of {path} already; name its id '
            "in adapter.trainable_token_indices to train its row, and leave it out"
        )
    return with_tokens(content, tokens)[1]


def positions_differ(overrides: ModelOverrides) -> bool:
    """Return whether any setting of positions is given."""
    return overrides.max_position_embeddings is not None or overrides.rope_scaling is not None


def with_overrides(
    settings: Mapping[str, Any], overrides: ModelOverrides, path: str
) -> dict[str, Any]:
    """Return a language model's settings, as transformers writes them, with others in their place.

    Raises:
        ConfigError: its rotary settings differ by layer.
    """
    values = copy.deepcopy(dict(settings))
    if overrides.rope_scaling is not None:
        values["rope_parameters"] = rope_parameters(values, overrides.rope_scaling, path)
        if ORIGINAL in values and ORIGINAL in values["rope_parameters"]:  # which Phi-3 prefers
            values[ORIGINAL] = values["rope_parameters"][ORIGINAL]
    if overrides.max_position_embeddings is not None:
        values[POSITIONS] = overrides.max_position_embeddings
    if overrides.new_tokens:
        largest = max(new_ids(overrides.new_tokens, Path(path)))
        values["vocab_size"] = max(values["vocab_size"], largest + 1)
    return values


def rope_parameters(values: Mapping[str, Any], scaling: RopeScaling, path: str) -> dict[str, Any]:
    """Return the rotary settings with a scaling in place of the model's own.

    Raises:
        ConfigError: as `with_overrides`.
    """
    own = values.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in own.values()):
        raise ConfigError(
            f"model_overrides.rope_scaling: the rotary settings of {path} differ by layer "
            f"({', '.join(own)}); set rope_parameters in its config.json"
        )
    found = {key: own[key] for key in KEPT if key in own} | scaling.settings
    if scaling.rope_type in WITH_ORIGINAL:
        before = own.get(ORIGINAL) or values.get(ORIGINAL) or values.get(POSITIONS)
        found.setdefault(ORIGINAL, before)
    return found
