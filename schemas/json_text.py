"""JSON of files from elsewhere, read within limits; one line says what is wrong with it."""

import itertools
import json
from pathlib import Path
from typing import Any

from headrace.schemas.errors import DataError
from headrace.schemas.named_files import read_regular
from headrace.schemas.outside_text import json_type

MAX_BYTES = 1 << 30
MAX_DEPTH = 64
NESTED = frozenset((dict, list))  # what JSON nests


def parse_json(content: bytes, path: Path | str, remedy: str = "") -> Any:
    """Return the value in a file's bytes; `path` and `remedy` are for messages.

    Raises:
        DataError: as `read_json`.
    """
    try:
        values = json.loads(content)
        if b"\\ud" in content or b"\\uD" in content:  # half of a pair alone is no text
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise too_deep(path) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}){remedy}") from None
    brackets = content.count(b"[") + content.count(b"{")
    if brackets > MAX_DEPTH and depth_of(values) > MAX_DEPTH:
        raise too_deep(path)
    return values


def depth_of(values: Any) -> int:
    """Return how deep lists and objects lie in each other, counted to just above the limit."""
    level, depth = [values] if isinstance(values, dict | list) else [], 0
    while level and depth <= MAX_DEPTH:
        parts = (parent.values() if type(parent) is dict else parent for parent in level)
        # without a call for each: a tokenizer may have a hundred thousand pairs as merges
        level = [value for value in itertools.chain.from_iterable(parts) if type(value) in NESTED]
        depth += 1
    return depth


def too_deep(path: Path | str) -> DataError:
    """Return the error for JSON that is nested too deeply."""
    return DataError(f"{path}: not valid JSON (nested more than {MAX_DEPTH} deep)")


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: no regular file, too large, not JSON, too deep, or text that is no Unicode.
    """
    return parse_json(read_regular(path, max_bytes), path)


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        DataError: as `read_json`, or something else than an object.
    """
    values = read_json(path, max_bytes)
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds {json_type(values)}, where an object is expected")
    return values
