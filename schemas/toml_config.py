"""TOML file plus `--set` overrides into a frozen pydantic model, with errors that name file, line and remedy."""

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import fingerprint


class Config(BaseModel):
    """Base of all config tables: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def fingerprint(self, exclude: set[str] | None = None) -> str:
        """SHA-256 of the resolved values, leaving out the named top-level keys."""
        return fingerprint(self.model_dump(mode="json", exclude=exclude))


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read one config file once.

    Args:
        overrides: `key.sub=value` with a TOML value; a bare word is taken as a string.

    Raises:
        ConfigError: one line per mistake, each with file, line, and the nearest known key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; give the path of a TOML config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        apply_override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [describe(model, path, text, detail) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in a nested dictionary, in place."""
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f'--set {override}: write it as key=value, for example "optimizer.lr=1e-4"'
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    *tables, name = key.strip().split(".")
    target = values
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {table} is not a table")
    target[name] = value


def describe(model: type[BaseModel], path: Path, text: str, detail: ErrorDetails) -> str:
    """One line for one pydantic error."""
    location = [
        part
        for part in detail["loc"]
        if isinstance(part, int) or part in text or part.isidentifier()
    ]
    key = ".".join(str(part) for part in location)
    line = find_line(text, location)
    where = f"{path}:{line}" if line else f"{path}"
    if detail["type"] == "extra_forbidden":
        known = known_keys(model, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = (
            f'did you mean "{nearest[0]}"?'
            if nearest
            else f"known keys: {', '.join(sorted(known))}"
        )
        return f'{where}: unknown key "{key}"; {hint}'
    if detail["type"] == "missing":
        return f'{where}: required key "{key}" is missing'
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key} = {detail['input']!r}: {message[:1].lower()}{message[1:]}"


def find_line(text: str, location: Sequence[str | int]) -> int | None:
    """The line of a key: the n-th `name =` or `[name]` in the file, or None if it stands in no line."""
    names = [part for part in location if isinstance(part, str)]
    indices = [part for part in location if isinstance(part, int)]
    start = 0
    for name in names:
        pattern = (
            rf"^\s*(?:\[\[?\s*(?:[\w.\-]+\.)?{re.escape(name)}\s*\]?\]|\"?{re.escape(name)}\"?\s*=)"
        )
        matches = list(re.finditer(pattern, text[start:], re.MULTILINE))
        if not matches:
            continue
        nth = indices.pop(0) if indices and name != names[-1] else 0
        start += matches[min(nth, len(matches) - 1)].end()
    if start == 0:
        return None
    return text.count("\n", 0, start) + 1


def known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys of the table that a location names."""
    current = model
    for part in location:
        if isinstance(part, str) and part in current.model_fields:
            nested = table_model(current.model_fields[part].annotation)
            if nested is None:
                break
            current = nested
    return list(current.model_fields)


def table_model(annotation: Any) -> type[BaseModel] | None:
    """The config class inside `Table`, `list[Table]` or `Table | None`; None for plain values."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = table_model(argument)
        if found is not None:
            return found
    return None
