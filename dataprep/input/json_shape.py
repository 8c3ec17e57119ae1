"""Check that a file without a list's bracket at its begin has a record in each line."""

import json
import re

from headrace.dataprep.input.streams import BOM, open_bytes, read_chunk
from headrace.schemas.errors import DataError

HEAD_BYTES = 1 << 16
STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?')
OPENED = re.compile(rb"[{\[]")
CLOSED = re.compile(rb"[}\]]")


def check_lines(path: str) -> None:
    """Refuse a file whose first object goes on over several lines.

    Raises:
        DataError: with the command that writes a record on each line.
    """
    with open_bytes(path) as stream:
        head = read_chunk(stream, path, HEAD_BYTES).removeprefix(BOM).lstrip()
    if goes_on(head):
        name = list_name(head)
        filters = f"'.[{name}][]'" if name else "."
        raise DataError(
            f"{path}: its first object goes on over several lines, where each line must be a "
            f"record; write them so, for example with `jq -c {filters} {path}`"
        )


def goes_on(head: bytes) -> bool:
    """Return whether the first line opens an object that a later line, no record itself, goes on.

    A line of JSONL that is cut short is followed by the next record; it is refused alone.
    """
    line, _, rest = head.partition(b"\n")
    bare = STRINGS.sub(b"", line)
    depth = len(OPENED.findall(bare)) - len(CLOSED.findall(bare))
    follows = rest.lstrip()[:1]
    goes_on = follows != b"{" or bare.rstrip().endswith(b"[")
    return head[:1] == b"{" and depth > 0 and follows != b"" and goes_on


def list_name(head: bytes) -> str | None:
    """Return the name, in quotes, of the first field of an object if it is a list of objects."""
    found = re.match(rb'\{\s*("[\w -]*")\s*:\s*\[\s*\{', head)
    return found[1].decode() if found else None


def list_of_records(value: dict[str, object]) -> str | None:
    """Return the name of the field of an object that is a list of objects, or None."""
    lists = ((name, part) for name, part in value.items() if isinstance(part, list) and part)
    names = (name for name, part in lists if all(isinstance(item, dict) for item in part))
    return next((json.dumps(name) for name in names), None)
