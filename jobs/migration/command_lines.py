"""Programs and their flags, out of a shell script."""

import shlex
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError

JLLM_PROGRAMS = ("raw2ids", "shuffle_datasets", "repartition", "train_pipe")


def find_programs(text: str, path: Path) -> dict[str, dict[str, Any]]:
    """Program -> flags, of all command lines in a shell script."""
    programs: dict[str, dict[str, Any]] = {}
    try:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                name = word.rsplit("/", 1)[-1].removeprefix("jllm.").removesuffix(".py")
                name = name.rsplit(".", 1)[-1]
                if name in JLLM_PROGRAMS and ("jllm" in line or name == "train_pipe"):
                    programs[name] = parse_flags(words[place + 1 :])
                    break
                if word.endswith("train.py") and "--train_type" in line:
                    programs["train.py"] = parse_flags(words[place + 1 :])
                    break
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell script: {error}") from None
    return programs


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
