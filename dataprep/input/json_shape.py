"""Shape of a JSON file that begins with an object: lines, objects over lines, or a list in one."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import pyarrow as pa

from headrace.dataprep.input.streams import BOM, CHUNK_BYTES, open_bytes, read_chunk
from headrace.schemas.prepare.source_config import FileFormat

HEAD_BYTES = 1 << 16
MOST_NAMES = 1 << 10  # of fields that are looked at
HOLDERS = frozenset(("data", "rows", "records", "examples", "instances", "items", "train"))
STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?')
OPENED = re.compile(rb"[{\[]")
CLOSED = re.compile(rb"[}\]]")
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?P<closed>")?|[{}\[\]\n]', re.DOTALL)
NEXT = re.compile(rb"\s*(\S)")


class Shape(NamedTuple):
    """Format of a file that begins with an object, and the byte that its records begin at."""

    format: FileFormat | Literal["objects", "inside"]  # objects over lines, a list in an object
    start: int = 0


class Survey(NamedTuple):
    """Content of the first object of a file: names of its fields, the first byte in the first of
    them that is a list of objects, whether it goes over several lines, and whether more follows."""

    names: frozenset[str]
    list_start: int | None
    spread: bool
    more: bool


def find_shape(path: str, columns: Collection[str] | None, chunk_bytes: int = CHUNK_BYTES) -> Shape:
    """Return where the records of a file are.

    An object alone in its file, none of whose fields is a wanted one, and one of which is a list of
    objects, holds the records in that list.

    Args:
        columns: the wanted fields; None: all, of which those that usually hold records are none.
        chunk_bytes: are read at once.
    """
    with open_bytes(path) as stream:
        head = read_chunk(stream, path, HEAD_BYTES).removeprefix(BOM).lstrip()
    line, newline, rest = head.partition(b"\n")
    lines = bool(rest.strip()) and (is_object(line) or not goes_on(head))
    if head[:1] != b"{" or lines:
        return Shape("jsonl")
    survey = survey_object(path, chunk_bytes)
    if survey is None:
        return Shape("objects" if newline and goes_on(head) else "jsonl")
    alone = survey.list_start is not None and not survey.more
    wanted = survey.names - HOLDERS if columns is None else survey.names & {*columns}
    if survey.list_start is not None and alone and not wanted:
        return Shape("inside", survey.list_start)
    return Shape("objects" if survey.spread else "jsonl")


def is_object(line: bytes) -> bool:
    """Return whether a line is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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


def survey_object(path: str, chunk_bytes: int) -> Survey | None:
    """Look over the first object of a file; None if it never ends."""
    names: set[str] = set()
    depth, spread, list_start, end = 0, False, None, None
    with open_bytes(path) as stream:
        for offset, data, token, follows in tokens(stream, path, chunk_bytes):
            mark = token[0][:1]
            if mark == b'"' and depth == 1 and follows == b":" and len(names) < MOST_NAMES:
                names.add(token[0][1:-1].decode(errors="replace"))
            elif mark == b"\n":
                spread = spread or depth > 0
            elif mark in b"{[":
                depth += 1
                if mark == b"[" and depth == 2 and follows == b"{" and list_start is None:
                    list_start = offset + token.end()
            elif mark in b"}]":
                depth -= 1
                if not depth:
                    end = data[token.end() :]
                    break
        if end is None:
            return None
        more = bool(end.strip())
        while not more and (chunk := read_chunk(stream, path, chunk_bytes)):
            more = bool(chunk.strip())
    return Survey(frozenset(names), list_start, spread, more)


def tokens(
    stream: pa.NativeFile, path: str, chunk_bytes: int
) -> Iterator[tuple[int, bytes, re.Match[bytes], bytes]]:
    """Yield strings, brackets and line ends: the offset of the data they are in, the data, the
    match, and the character behind."""
    offset, rest = 0, b""
    while True:
        chunk = read_chunk(stream, path, max(chunk_bytes, len(rest)))
        data = rest + chunk
        kept = len(data)
        for token in TOKEN.finditer(data):
            follows = NEXT.match(data, token.end())
            cut = token[0][:1] == b'"' and token["closed"] is None
            if chunk and (cut or (follows is None and token[0][:1] in b'["')):
                kept = token.start()
                break
            yield offset, data, token, follows[1] if follows else b""
        if not chunk:
            return
        offset, rest = offset + kept, data[kept:]


def list_of_records(value: dict[str, object]) -> str | None:
    """Return the name of the field of an object that is a list of objects, or None."""
    lists = ((name, part) for name, part in value.items() if isinstance(part, list) and part)
    names = (name for name, part in lists if all(isinstance(item, dict) for item in part))
    return next((json.dumps(name) for name in names), None)
