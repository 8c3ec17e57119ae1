"""The prompt texts of `prompts.toml`, by type and style; names that are not known are refused."""

import difflib
import functools
import string
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from headrace.schemas.errors import ConfigError


@dataclass(frozen=True)
class Style:
    """Formats of a prompt: `turn` with an input, `bare` without one, `system` before them."""

    turn: str
    bare: str
    system: str = "{system}"


@dataclass(frozen=True)
class InstructType:
    """Columns that hold the texts of a row, and the texts written before them.

    `instruction` and `output` are formats over columns; `fallback` stands for `output` where its
    column is missing. `input` and `system_column` are columns, or empty. `derive` names texts that
    are made of columns first. An answer ends with `ends` EOS.
    """

    style: str
    instruction: str
    output: str
    input: str = ""
    system: str = ""
    bare_system: str | None = None
    system_column: str = ""
    styled: bool = False
    derive: str = ""
    fallback: str = ""
    ends: int = 1

    def system_text(self, with_input: bool) -> str:
        """The text of the system part, empty where there is none."""
        return self.system if with_input or self.bare_system is None else self.bare_system


@functools.cache
def prompt_texts() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads(files("headrace.dataprep.axolotl").joinpath("prompts.toml").read_text())


@functools.cache
def styles() -> dict[str, Style]:
    """Styles of prompts by name."""
    return {name: Style(**values) for name, values in prompt_texts()["styles"].items()}


@functools.cache
def instruct_types() -> dict[str, InstructType]:
    """Types of the instruction family by name."""
    return {name: InstructType(**inherit(name)) for name in prompt_texts()["types"]}


def inherit(name: str) -> dict[str, Any]:
    """A type's values, with those of the type that it is like."""
    values = dict(prompt_texts()["types"][name])
    like = values.pop("like", None)
    return (inherit(like) if like else {}) | values


@functools.cache
def placeholders(text: str) -> tuple[str, ...]:
    """The names in a format's braces."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def split_type(name: str) -> tuple[str, str | None]:
    """A type without `.load`, and the style after its colon."""
    name = name.replace(":load_", ".load_").removesuffix(".load")
    base, _, style = name.partition(":")
    return base, style or None


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """No such type or style, with the nearest there is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    return ConfigError(f'axolotl {what} "{name}" is not known; nearest: "{near[0]}"')


def check_format(key: str, text: str, known: set[str]) -> None:
    """A user's format may name nothing but the texts there are."""
    try:
        names = set(placeholders(text))
    except ValueError as error:
        raise ConfigError(
            f'type.{key} = "{text}": {error}; write braces twice to keep them'
        ) from None
    if names - known:
        shown = ", ".join(f"{{{name}}}" for name in sorted(known))
        raise ConfigError(
            f'type.{key} = "{text}": {{{min(names - known)}}} is not known; it may hold {shown}'
        )
