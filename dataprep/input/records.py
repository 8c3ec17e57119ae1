"""Records: rows of input as they were read, each on its own, and those that were refused."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MISSING_FIELD = "missing field"
SHOWN_FIELDS, SHOWN_NAME = 12, 60
TEXT, NUMBER = (str, bytes), (int, float)  # unions are made at each call


class Place(NamedTuple):
    """Position of a record's begin: `line` newlines after (decompressed) byte `start` of `file`."""

    file: str
    start: int
    line: int


class Record(NamedTuple):
    """One parsed row, and where it begins. A piece of a text file is {text_field: text}.

    `names` are those of all its fields, where `fields` holds only the wanted ones.
    """

    fields: dict[str, Any]
    place: Place
    names: Sequence[str] = ()


class Reject(NamedTuple):
    """One refused record. `line` counts from 1; in JSON lists and tables it is the record.

    `pictures` are those that it had, as far as they were told apart.
    """

    file: str
    line: int
    reason: str
    detail: str
    pictures: int = 0

    def described(self) -> dict[str, Any]:
        """Return what `rejects.jsonl` tells of it."""
        values = self._asdict()
        if not self.pictures:
            del values["pictures"]
        return values


def characters(value: object) -> int:
    """The size of a record: characters in its strings, and 4 for each number."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum([len(part) if type(part) is str else characters(part) for part in value])
    if isinstance(value, TEXT):
        return len(value)
    if isinstance(value, np.ndarray):
        return 4 * value.size
    return 4 if isinstance(value, NUMBER) else 0


def top_fields(path: str) -> frozenset[str]:
    """The fields of a record that may hold what a dotted path names."""
    return frozenset([path, path.split(".")[0]])


def find_field(fields: Any, path: str) -> Any:
    """Return the field that a dotted path names: one of that whole name, or one step after the
    other.

    `meta.text` is field `text` of field `meta`, `parts.0` the first entry of list `parts`.

    Raises:
        LookupError: it is not there.
    """
    if isinstance(fields, dict) and path in fields:
        return fields[path]
    head, dot, rest = path.partition(".")
    if isinstance(fields, list) and head.isdecimal():
        value = fields[int(head)]
    elif isinstance(fields, dict):
        value = fields[head]
    else:
        raise LookupError(path)
    if not dot:
        return value
    return find_field(value, rest)


def with_fields(reject: Reject, record: Record) -> Reject:
    """Return a reject that, if a field was missed, tells which the record has."""
    if reject.reason != MISSING_FIELD:
        return reject
    names = [json.dumps(name)[:SHOWN_NAME] for name in (record.names or record.fields)]
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    has = f"the record has {', '.join(names[:SHOWN_FIELDS])}{more}" if names else "it is empty"
    return reject._replace(detail=f"{reject.detail}; {has}")
