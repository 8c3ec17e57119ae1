"""A TOML file plus `--set` overrides into a frozen pydantic model, once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)

from headrace.schemas.config_errors import Location, describe_errors, dotted, table_model
from headrace.schemas.config_model import Config
from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import OutsideTextError, parse_toml, read_text

MOST_CONFIG_BYTES = 1 << 24


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read one config file.

    Args:
        overrides: `key.sub=value` with a TOML value; a bare word is taken as a string.

    Raises:
        ConfigError: one line per mistake, each with file, line, and the nearest known key.
    """
    try:
        text = read_text(path, MOST_CONFIG_BYTES, streams=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; give the path of a TOML config") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        values = parse_toml(text)
    except OutsideTextError as error:
        raise ConfigError(f"{path}: {error}") from None
    origins = {apply_override(values, override): override for override in overrides}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = describe_errors(model, error, path, text, origins)
        raise ConfigError("\n".join(lines)) from None


def apply_override(values: dict[str, Any], override: str) -> Location:
    """Set `key.sub=value` in place, or `datasets.0.path=value` in a list. Returns where."""
    key, equals, raw = override.partition("=")
    *tables, name = (part.strip() for part in key.split("."))
    if not equals or not all([*tables, name]):
        raise ConfigError(f'--set {override}: write it as key=value, as in "optimizer.lr=1e-4"')
    target: Any = values
    location: Location = ()
    for table in tables:
        step = step_into(target, table, location, override)
        location += (step,)
        target = target.setdefault(step, {}) if isinstance(target, dict) else target[step]
    step = step_into(target, name, location, override)
    target[step] = parse_value(raw)
    return (*location, step)


def step_into(target: Any, name: str, location: Location, override: str) -> str | int:
    """The key or index that `name` means in a table or list."""
    if isinstance(target, dict):
        return name
    if not isinstance(target, list):
        raise ConfigError(f"--set {override}: {dotted(location)} is not a table")
    if name.isdecimal() and int(name) < len(target):
        return int(name)
    raise ConfigError(
        f"--set {override}: {dotted(location)} is a list of {len(target)}; "
        f"name one by its number from 0, as in {dotted(location)}.0"
    )


def parse_value(raw: str) -> Any:
    """A TOML value; anything else is a string as it stands, so paths need no quotes."""
    try:
        return parse_toml(f"value = {raw}")["value"]
    except OutsideTextError:
        return raw.strip()


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
