"""JSON files from elsewhere, read within limits."""

from pathlib import Path
from typing import Any

from headrace.schemas.errors import DataError
from headrace.schemas.json_text import name_of, parse_json
from headrace.schemas.named_files import read_regular

MAX_BYTES = 1 << 30


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
        raise DataError(f"{path}: holds {name_of(values)}, where an object is expected")
    return values
