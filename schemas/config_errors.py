"""Pydantic's errors about a config as one line each: file, line, value seen, remedy."""

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]

# what other trainers call the same thing
SYNONYMS = {
    "batch_size": "micro_batch_size",
    "checkpoint_every_n_minutes": "every_minutes",
    "dataset_combination_mode": "mixing",
    "dataset_interleave_stopping_strategy": "mixing_stop",
    "eval_datasets": "evaluation_datasets",
    "eval_every_n_steps": "every_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_target_modules": "target_modules",
    "max_grad_norm": "gradient_clipping",
    "max_seq_length": "sequence_len",
    "micro_batch_size_per_gpu": "micro_batch_size",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "num_repeats": "repeats",
    "optim": "optimizer",
    "r": "rank",
    "sample_weight": "weight",
    "steps": "max_steps",
    "val_set_size": "evaluation_fraction",
}
TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def describe_errors(
    model: type[BaseModel],
    error: ValidationError,
    path: Path,
    text: str,
    overrides: Mapping[Location, str],
) -> list[str]:
    """One line per mistake.

    Of a union's members, the one that came furthest speaks. A required key is not called missing
    where an unknown key was meant to be it.
    """
    details: dict[Location, ErrorDetails] = {}
    for detail in error.errors():
        location = key_location(model, detail["loc"])
        if location not in details or is_wrong_type(details[location]):
            details[location] = detail
    meant = {
        suggest(model, location)
        for location, detail in details.items()
        if detail["type"] == "extra_forbidden"
    }
    return [
        f"{locate(location, path, text, overrides)}: {describe(model, location, detail)}"
        for location, detail in details.items()
        if not (detail["type"] == "missing" and location in meant)
        and not any(other[: len(location)] == location for other in details if other != location)
    ]


def is_wrong_type(detail: ErrorDetails) -> bool:
    """Return whether the value has another type than the key, or is not one of its choices."""
    kind = detail["type"]
    return kind.endswith("_type") or kind in {"int_from_float", "literal_error"}


def describe(model: type[BaseModel], location: Location, detail: ErrorDetails) -> str:
    """Return the message for one error, without its file and line."""
    key = dotted(location)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return describe_unknown(model, location)
    if kind == "missing":
        return f'required key "{key}" is missing'
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    seen = f"{key} = {shown(detail['input'])}"
    if is_wrong_type(detail):
        return f"{seen}: expected {type_text(annotation_at(model, location))}"
    return f"{seen}: {re.sub('^[A-Z][a-z]+ should', 'must', detail['msg'])}"


def key_location(model: type[BaseModel], parts: Sequence[str | int]) -> Location:
    """The part of a pydantic location that stands in the file: union members are left out.

    Beside tables a union's members carry tags in angle brackets.
    """
    location: Location = ()
    table: type[BaseModel] | None = model
    for part in parts:
        if isinstance(part, str) and (table is None or part.startswith("<")):
            continue
        location += (part,)
        if isinstance(part, str) and table is not None:
            field = table.model_fields.get(part)
            table = table_model(field.annotation) if field else None
    return location


def locate(location: Location, path: Path, text: str, overrides: Mapping[Location, str]) -> str:
    """`--set key=value` where that set the value, else file and line, else the file."""
    for set_location, override in reversed(list(overrides.items())):
        shorter = min(len(set_location), len(location))
        if location and set_location[:shorter] == location[:shorter]:
            return f"--set {override}"
    lines = key_lines(text)
    for length in range(len(location), 0, -1):
        if location[:length] in lines:
            return f"{path}:{lines[location[:length]]}"
    return str(path)


def key_lines(text: str) -> dict[Location, int]:
    """The line on which each key and table of a valid TOML text starts.

    Lines are collected until they parse: a string or array over several lines is one statement.
    """
    lines: dict[Location, int] = {}
    table: Location = ()
    last_index: dict[Location, int] = {}
    statement, start = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        statement, start = (f"{statement}\n{line}", start) if statement else (line, number)
        try:
            values = tomllib.loads(statement)
        except (ValueError, RecursionError):
            continue
        if statement.lstrip().startswith("["):
            table = open_table(values, last_index)
            lines.setdefault(table, start)
        else:
            for location in locations(values):
                lines.setdefault(table + location, start)
        statement = ""
    return lines


def open_table(header: dict[str, Any], last_index: dict[Location, int]) -> Location:
    """The location that a `[table]` or `[[table]]` header opens; counts the lists' entries."""
    location: Location = ()
    value: Any = header
    while isinstance(value, dict) and value:
        ((name, value),) = value.items()
        location += (name,)
        if isinstance(value, list):
            last_index[location] = last_index.get(location, -1) + 1
        if location in last_index:
            location += (last_index[location],)
    return location


def locations(value: Any) -> Iterator[Location]:
    """Every key and index inside a TOML value."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield (key,)
            for location in locations(child):
                yield (key, *location)


def suggest(model: type[BaseModel], location: Location) -> Location | None:
    """The key that was meant by an unknown one: of this table, or else of the only one with it."""
    name = str(location[-1])
    here = table_at(model, location[:-1])
    known = list(here.model_fields) if here else []
    meant = SYNONYMS.get(name, name)
    if meant in known:
        return (*location[:-1], meant)
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest and meant == name:
        return (*location[:-1], nearest[0])
    elsewhere = [
        (table, meant)
        for table, field in model.model_fields.items()
        if (nested := table_model(field.annotation)) and meant in nested.model_fields
    ]
    return elsewhere[0] if len(elsewhere) == 1 else None


def describe_unknown(model: type[BaseModel], location: Location) -> str:
    """An unknown key and what to write instead."""
    meant = suggest(model, location)
    here = table_at(model, location[:-1])
    known = ", ".join(sorted(here.model_fields)) if here else "none"
    hint = f'did you mean "{dotted(meant)}"?' if meant else f"known keys: {known}"
    return f'unknown key "{dotted(location)}"; {hint}'


def table_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The table that a location names."""
    found = annotation_at(model, location) if location else model
    return table_model(found)


def annotation_at(model: type[BaseModel], location: Location) -> Any:
    """The declared type of the key at a location, or of an entry of its list."""
    annotation: Any = model
    for part in location:
        if isinstance(part, int):
            annotation = list_entry(annotation)
        elif (table := table_model(annotation)) and part in table.model_fields:
            annotation = table.model_fields[part].annotation
    return annotation


def list_entry(annotation: Any) -> Any:
    """`T` for a type that admits `list[T]`, else None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return arguments[0]
    return next((entry for argument in arguments if (entry := list_entry(argument))), None)


def table_model(annotation: Any) -> type[BaseModel] | None:
    """The config class inside `Table`, `list[Table]` or `Table | None`; None for plain values."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if found := table_model(argument):
            return found
    return None


def type_text(annotation: Any) -> str:
    """A type in the words of a config file: `"a" or "b"`, `integer`, `list of strings`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is typing.Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}s"
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(type_text(a) for a in arguments if a is not types.NoneType)
    return TYPE_NAMES.get(annotation, "table")


def dotted(location: Location) -> str:
    """`optimizer.lr`, `sources.0.path`: as `--set` takes it."""
    return ".".join(str(part) for part in location)


def shown(value: Any) -> str:
    """A value as TOML writes it, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
