"""Tokens that end an answer. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.architecture.families import text_settings


def stop_tokens(
    settings: RejectedSamplingConfig, directory: Path, manifests: Sequence[Manifest]
) -> frozenset[int]:
    """The ids that the config names, or the model's and the shards' own.

    Args:
        directory: of the model.

    Raises:
        ConfigError: neither model nor shards name one.
    """
    if settings.stop_tokens is not None:
        return frozenset(settings.stop_tokens)
    found = set(_model_stops(directory))
    found |= {m.tokenizer.special_tokens.get("eos", -1) for m in manifests} - {-1}
    if not found:
        raise ConfigError(
            f"{directory}: neither the model nor the shards' tokenizer has an EOS; name the ids "
            "that end an answer in rejected_sampling.stop_tokens"
        )
    return frozenset(found)


def _model_stops(directory: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, else of config.json; none if neither has it."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stops: Any = text_settings(values).get("eos_token_id", values.get("eos_token_id"))
        if stops is not None:
            return [int(stop) for stop in (stops if isinstance(stops, list) else [stops])]
    return []
