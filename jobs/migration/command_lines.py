"""Programs and their flags, out of a shell script."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=([^$`]*)$")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
JLLM_PROGRAMS = ("raw2ids", "shuffle_datasets", "repartition", "train_pipe")


def find_programs(text: str, path: Path) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """Return the flags of each program in a shell script, the last time that it is called.

    Values of variables that the script itself sets are put in.

    Returns:
        Program -> flags, and how often each is called.

    Raises:
        ConfigError: quotes that do not end.
    """
    programs: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    variables: dict[str, str] = {}
    try:
        for line in text.replace("\\\n", " ").splitlines():
            words = [expand(word, variables) for word in shlex.split(line, comments=True)]
            variables |= assignments(words)
            for place, word in enumerate(words):
                name = word.rsplit("/", 1)[-1].removeprefix("jllm.").removesuffix(".py")
                name = name.rsplit(".", 1)[-1]
                if name in JLLM_PROGRAMS and ("jllm" in line or name == "train_pipe"):
                    programs[name] = parse_flags(words[place + 1 :])
                    counts[name] += 1
                    break
                if word.endswith("train.py") and "--train_type" in line:
                    programs["train.py"] = parse_flags(words[place + 1 :])
                    counts["train.py"] += 1
                    break
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell script: {error}") from None
    return programs, counts


def assignments(words: Sequence[str]) -> dict[str, str]:
    """Return the variables that a command line sets: `NAME=value`, maybe after `export`."""
    found = {}
    for word in words[1:] if words[:1] == ["export"] else words:
        match = ASSIGNMENT.match(word)
        if match is None:
            break
        found[match[1]] = match[2]
    return found


def expand(word: str, variables: Mapping[str, str]) -> str:
    """Return a word with the variables that are known, and defaults as in `${NAME:-4}`, put in."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[3], match[2] or match[0])

    return VARIABLE.sub(value, word)


def parse_flags(words: list[str]) -> dict[str, Any]:
    """`--flag value`, `--flag=value` and bare flags; numbers as numbers."""
    flags: dict[str, Any] = {}
    waiting: str | None = None
    for word in words:
        if word in ("&&", ";", "|", "&", ">", "2>&1"):
            break
        if is_flag(word):
            name, equals, value = word.partition("=")
            flags[name] = plain(value) if equals else True
            waiting = None if equals else name
        elif waiting is not None:
            flags[waiting] = plain(word)
            waiting = None
        else:
            flags.setdefault("(argument)", word)
    return flags


def is_flag(word: str) -> bool:
    """Return whether a word is a flag and not a negative number."""
    return word.startswith("-") and len(word) > 1 and isinstance(plain(word), str)


def plain(word: str) -> Any:
    """A word as the number or truth value that it spells."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
