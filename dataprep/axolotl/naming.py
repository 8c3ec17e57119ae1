"""Types, styles and formats by name: what is not known is refused with the nearest that is."""

import difflib
from collections.abc import Iterable

from headrace.dataprep.axolotl.prompts import placeholders
from headrace.schemas.errors import ConfigError


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
