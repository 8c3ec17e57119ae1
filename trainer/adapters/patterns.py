"""Regular expressions of adapters from elsewhere, resolved to names of modules within a time limit.

PEFT runs them over every module, and some take for ever. It is given names instead.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex
from peft import LoraConfig

from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import shown

REFUSED = ("layer_replication", "megatron_config")  # copies layers; imports a module it names
PLAIN = re.compile(r"[\w\-]+(\.[\w\-]+)*")
LAST_NAME = re.compile(r"[\w\-]+")
MAX_PATTERN = 10_000  # letters
SECONDS = 5.0


def name_modules(
    settings: LoraConfig,
    modules: Sequence[str],
    adapter: Path,
    parameters: Sequence[str] = (),
    inward: Callable[[str], str] = str,
) -> None:
    """Put names of modules in place of the expressions of an adapter's config.

    Args:
        modules: names of all modules of the model without adapters.
        parameters: of all its parameters, which may have ranks of their own.
        inward: from these names to those of the model that gets the adapter.

    Raises:
        ConfigError: an expression that is none, takes too long, or matches nothing.
    """
    for key in REFUSED:
        if getattr(settings, key, None):
            raise ConfigError(f"{adapter}: {key} is not supported; merge the adapter with PEFT")
    matcher = Matcher(adapter, time.monotonic() + SECONDS)
    for key in ("modules_to_save", "layers_pattern", "target_parameters"):
        for name in as_list(getattr(settings, key, None)):
            if not isinstance(name, str) or not PLAIN.fullmatch(name):
                raise ConfigError(f"{adapter}: {key}: {shown(name)} is not the name of a module")
    if isinstance(settings.target_modules, str) and settings.target_modules != "all-linear":
        found = matcher.matching("target_modules", settings.target_modules, modules)
        if not found:
            raise ConfigError(
                f"{adapter}: target_modules = {shown(settings.target_modules)} matches no module"
            )
        settings.target_modules = set(found)
    if isinstance(settings.target_modules, list | set):
        settings.target_modules = {inward(target) for target in settings.target_modules}
    if isinstance(settings.exclude_modules, str):
        found = matcher.matching("exclude_modules", settings.exclude_modules, modules)
        settings.exclude_modules = {inward(name) for name in found} or None
    if settings.target_parameters:
        settings.target_parameters = [inward(name) for name in settings.target_parameters]
    for key in ("rank_pattern", "alpha_pattern"):
        given = getattr(settings, key) or {}
        named = matcher.by_module(key, given, [*modules, *parameters])
        named = {inward(name): value for name, value in named.items()}
        setattr(settings, key, {as_pattern(name): value for name, value in named.items()})


def as_pattern(name: str) -> str:
    """Return the expression for a name: itself if it is an end of names."""
    return name if LAST_NAME.fullmatch(name) else "^" + re.escape(name)


def as_list(value: Any) -> list[Any]:
    """Return a setting that may be one value, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set) else [value]


class Matcher:
    """Matches expressions until a moment in time.

    Args:
        adapter: for messages.
        end: of the time, as `time.monotonic` counts.
    """

    def __init__(self, adapter: Path, end: float) -> None:
        self.adapter = adapter
        self.end = end

    def matching(self, key: str, pattern: str, names: Iterable[str]) -> list[str]:
        """Return the names that an expression matches as a whole.

        Raises:
            ConfigError: it is none, or takes too long.
        """
        where = f"{self.adapter}: {key}: {shown(pattern)}"
        if len(pattern) > MAX_PATTERN:
            raise ConfigError(f"{where} has more than {MAX_PATTERN} letters")
        try:
            compiled = regex.compile(pattern)
            return [
                name
                for name in names
                if compiled.fullmatch(name, timeout=max(self.end - time.monotonic(), 1e-3))
            ]
        except regex.error as error:
            raise ConfigError(f"{where} is not a regular expression ({error})") from None
        except TimeoutError:
            raise ConfigError(f"{where} takes longer than {SECONDS:g} s to match") from None

    def by_module(
        self, key: str, given: Mapping[str, Any], modules: Sequence[str]
    ) -> dict[str, Any]:
        """Return a setting by module, of which the keys are ends of names or expressions.

        The first that matches counts, as with PEFT.
        """
        if all(LAST_NAME.fullmatch(pattern) for pattern in given):
            return dict(given)
        values: dict[str, Any] = {}
        for pattern, value in given.items():
            for name in self.matching(key, rf"(.*\.)?({pattern})", modules):
                values.setdefault(name, value)
        return values
