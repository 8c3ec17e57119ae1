"""Axolotl's keys about the model itself: the adapter it starts from, new tokens, positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headrace.jobs.migration.equivalents import Equivalent, NoEquivalentError, Values

ROPE = "train.model_overrides.rope_scaling"
POSITIONS = "max_position_embeddings"


def unless_started(row: Equivalent) -> Equivalent:
    """Return a row that says nothing where training starts from an adapter, as in Axolotl."""
    convert = row.convert
    assert convert is not None

    def converted(value: Any, values: Values) -> dict[str, Any]:
        return {} if values.get("lora_model_dir") else convert(value, values)

    return replace(row, convert=converted)


def token_rows(value: Any, _: Values) -> dict[str, Any]:
    """Convert ids of tokens whose rows are trained, which may be given by module."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    if any(found != lists[0] for found in lists):
        raise NoEquivalentError("the same ids for embedding and head have one")
    return {"train.adapter.trainable_token_indices": list(lists[0])} if lists else {}


def new_tokens(value: Any, values: Values) -> dict[str, Any]:
    """Convert tokens that are added to the tokenizer, with the special ones behind them."""
    special = (values.get("special_tokens") or {}).get("additional_special_tokens") or []
    found = [*(value or ()), *special]
    return {"train.model_overrides.new_tokens": found} if found else {}


def overrides(value: Any, values: Values) -> dict[str, Any]:
    """Convert settings that take the place of those in config.json."""
    found: dict[str, Any] = {}
    for key, setting in (value or {}).items():
        if key == POSITIONS:
            found[f"train.model_overrides.{POSITIONS}"] = setting
        elif key in ("rope_scaling", "rope_parameters"):
            found |= rope_scaling(setting, values)
    left = set(value or ()) - {POSITIONS, "rope_scaling", "rope_parameters"}
    if left:
        raise NoEquivalentError(f"{', '.join(sorted(left))}: edit config.json of the model", found)
    return found


def rope_scaling(value: Any, _: Values) -> dict[str, Any]:
    """Convert the scaling of rotary positions, whose type is `type` in older files."""
    if not value:
        return {}
    table = {("rope_type" if key == "type" else key): setting for key, setting in value.items()}
    numbers = {
        key: float(v) for key, v in table.items() if type(v) is int and "position" not in key
    }
    return {ROPE: table | numbers}
