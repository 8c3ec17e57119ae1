"""A config that a run has recorded, with all its defaults, read again."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from headrace.schemas.config_errors import table_model


def without_defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded values less those that a config has anyway.

    What a config says and what it leaves to defaults is not the same to it: it refuses settings
    that mean nothing beside others, and a record holds all of them.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if field is None:
            kept[name] = value  # of another release: for the config to refuse
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        if value == default:
            continue
        table = table_model(field.annotation)
        if table is not None and isinstance(value, Mapping):
            value = without_defaults(table, value)
        elif table is not None and isinstance(value, list):
            value = [without_defaults(table, entry) for entry in value]
        kept[name] = value
    return kept
