"""An imported config: values for our two configs, and a list of what was left out."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.jobs.old_systems.equivalents import Equivalent, NoEquivalentError, OldSystem
from headrace.schemas.config_errors import describe_errors
from headrace.schemas.config_model import Config
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.train.train_config import TrainConfig

COMMAND = "headrace "


@dataclass(frozen=True)
class LeftOut:
    """An old setting that is not in our configs."""

    key: str
    value: Any
    reason: str


@dataclass
class Imported:
    """Configs as TOML values, by file name; `train.toml` is one of them."""

    train: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, dict[str, Any]] = field(default_factory=dict)  # file name -> values
    left_out: list[LeftOut] = field(default_factory=list)

    def leave(self, key: str, value: Any, reason: str) -> None:
        self.left_out.append(LeftOut(key, value, reason))

    def check(self) -> None:
        """Refuse values that our configs would refuse.

        Raises:
            ConfigError: naming our key.
        """
        models: list[tuple[str, type[Config], dict[str, Any]]] = []
        models += [(name, PrepareConfig, values) for name, values in self.prepare.items()]
        adapter = {k: v for k, v in self.train.get("adapter", {}).items() if k != "path"}
        train = self.train | ({"adapter": adapter} if adapter else {})
        models += [("train.toml", TrainConfig, train)]  # the adapter may lie on another machine
        for name, model, values in models:
            try:
                model.model_validate(values)
            except ValidationError as error:
                lines = describe_errors(model, error, Path(name), to_toml(values), {})
                raise ConfigError(
                    "\n".join(lines) + "\nthe old config asks for this; correct it there"
                ) from None

    def files(self) -> dict[str, str]:
        """File name -> TOML text; what was left out stands at the head of `train.toml`."""
        texts = {name: to_toml(values) for name, values in self.prepare.items()}
        notes = [f"# {line}\n" for line in self.report()]
        return texts | {
            "train.toml": "".join(notes) + ("\n" if notes else "") + to_toml(self.train)
        }

    def report(self) -> list[str]:
        """One line for each setting that was left out."""
        return [
            f"not taken over: {item.key} = {shown(item.value)}: {item.reason}".replace("\n", " ")
            for item in self.left_out
        ]


def apply(system: OldSystem, old: Mapping[str, Any], imported: Imported) -> dict[str, Any]:
    """Our keys with their values, from a system's rows; what has none is noted.

    Args:
        old: flat: tables as dotted keys. Lists of tables are left to the system.
    """
    rows = system.by_key()
    new: dict[str, Any] = dict(system.fixed)
    for row in rows.values():
        if row.old not in old and row.default is not None and row.convert is not None:
            new |= translate(row, row.default, old, imported)
    for key, value in old.items():
        if key in rows:
            new |= translate(rows[key], value, old, imported)
        else:
            imported.leave(key, value, "not a key that the old system knows")
    return new


def translate(
    row: Equivalent, value: Any, old: Mapping[str, Any], imported: Imported, prefix: str = ""
) -> dict[str, Any]:
    """Return the keys and values that one old value is converted to."""
    if row.convert is not None:
        try:
            return converted(row, value, old)
        except NoEquivalentError as reason:
            imported.leave(prefix + row.old, value, str(reason))
            return reason.instead
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{prefix}{row.old}: {shown(value)}: cannot be converted ({error!r}); correct it "
                "in the old config"
            ) from None
    elif (not row.new or row.new[0].startswith(COMMAND)) and not is_neutral(value, row):
        use = f"use `{row.new[0]}`" if row.new else ""
        imported.leave(prefix + row.old, value, "; ".join(part for part in (use, row.note) if part))
    return {}


def converted(row: Equivalent, value: Any, old: Mapping[str, Any]) -> dict[str, Any]:
    """Values of our keys; a row writes no others than it names."""
    assert row.convert is not None
    new = row.convert(value, old)
    assert new.keys() <= set(row.new), row.old
    return new


def is_neutral(value: Any, row: Equivalent) -> bool:
    """Return whether a value asks for nothing; 0 and False differ here."""
    return any(value == other and type(value) is type(other) for other in row.neutral)


def entry_rows(system: OldSystem, prefix: str) -> dict[str, Equivalent]:
    """Rows of the entries of a list of tables, by the key in the entry."""
    start = f"{prefix}[]."
    return {row.old.removeprefix(start): row for row in system.rows if row.old.startswith(start)}


def flatten(
    values: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()
) -> dict[str, Any]:
    """Nested tables as dotted keys; lists stay, and tables whose dotted key is in `whole`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix + key not in whole:
            flat |= flatten(value, f"{prefix}{key}.", whole)
        else:
            flat[prefix + key] = value
    return flat


def nest(flat: Mapping[str, Any], config: str) -> dict[str, Any]:
    """Values of `train.…` or `prepare.…` keys as nested tables."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        name, *path = key.split(".")
        if name != config:
            continue
        table = nested
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = value
    return nested


def to_toml(values: Mapping[str, Any]) -> str:
    """A TOML document: plain keys, then tables, then lists of tables; in the given order."""
    return "\n".join(table_lines(values, "")).lstrip("\n") + "\n"


def table_lines(values: Mapping[str, Any], prefix: str) -> list[str]:
    lines = [
        f"{toml_key(key)} = {toml_value(value)}"
        for key, value in values.items()
        if not is_table(value) and not is_table_list(value)
    ]
    for key, value in values.items():
        name = f"{prefix}{toml_key(key)}"
        if is_table(value):
            lines += ["", f"[{name}]", *table_lines(value, f"{name}.")]
        elif is_table_list(value):
            for entry in value:
                lines += ["", f"[[{name}]]", *table_lines(entry, f"{name}.")]
    return lines


def is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_table, value))


def toml_key(key: str) -> str:
    """Bare where TOML allows it."""
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else json.dumps(key, ensure_ascii=False)


def toml_value(value: Any) -> str:
    """A value as TOML writes it; JSON writes these the same way."""
    return json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> str:
    """A value for people, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
