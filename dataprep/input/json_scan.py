"""Scan for the values of a JSON list, or of objects over lines, in bounded memory.

Only strings and brackets are followed; whether a value is sound is seen when it is parsed. So a
broken value is one record, and does not end the list.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from headrace.dataprep.input.streams import (
    BOM,
    CHUNK_BYTES,
    compression,
    lines_before,
    open_bytes,
    read_chunk,
)
from headrace.schemas.errors import DataError

SPACE = b" \t\n\r"
STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # up to its end, or what is there of it
IN_LIST = re.compile(rb'["\[\]{},]')
IN_VALUE = re.compile(rb'["\[\]{}]')


class Span(NamedTuple):
    """A value of a list: its first byte, and its bytes, or None where there are more than wanted.

    White space may stand around it.
    """

    start: int
    data: bytes | None


def scan_json(
    path: str, layout: str, start: int, limit: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Span]:
    """The values of a JSON file, from byte `start` on, at which one begins; 0 for all.

    Args:
        layout: `"json"`: they are in a list, which is all of the file; `"inside"`: in a list, and
            what is behind it is of no interest; `"objects"`: they follow each other.
        limit: bytes of a value above which they are not kept.
        chunk_bytes: are read at once.

    Raises:
        DataError: it is not of that layout, or ends before its end.
    """
    scan = (ObjectsScan if layout == "objects" else ListScan)(path, start, limit)
    with open_bytes(path) as stream:
        if start:
            pass_bytes(stream, path, start, chunk_bytes)
        while not (scan.ended and layout == "inside") and (
            chunk := read_chunk(stream, path, max(chunk_bytes, len(BOM)))
        ):
            yield from scan.values(chunk, layout == "inside")
        scan.check_end()


def pass_bytes(stream: pa.NativeFile, path: str, count: int, chunk_bytes: int) -> None:
    """Go to a byte of a stream that stands at its start, by chunks where it is compressed."""
    if not compression(path):
        stream.seek(count)
        return
    while count and (chunk := read_chunk(stream, path, min(chunk_bytes, count))):
        count -= len(chunk)


class ListScan:
    """Follows the strings and brackets of a list, chunk by chunk."""

    def __init__(self, path: str, start: int, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.depth = 1 if start else 0
        self.in_string = False
        self.escaped = False  # the last chunk ended with a backslash in a string
        self.ended = False
        self.count = 1 if start else 0  # values so far; of a list that goes on, there are some
        self.position = start  # of the chunk
        self.value_start = start
        self.parts: list[bytes] = []
        self.size = 0

    commas_at = 1  # depth at which they part values

    def values(self, chunk: bytes, first_list: bool = False) -> Iterator[Span]:
        """The values that end in a chunk.

        Args:
            first_list: what is behind the list is not looked at.
        """
        place, kept = 0, 0  # the next byte to look at; the first that is not kept yet
        if self.position == 0 and chunk.startswith(BOM):
            place = kept = len(BOM)
        while place < len(chunk):
            if self.in_string:
                place = self.pass_string(chunk, place)
            elif self.depth == 0 and self.ended and first_list:
                return
            elif self.depth == 0:
                place = kept = self.pass_outside(chunk, place)
            else:
                found = (IN_LIST if self.depth == self.commas_at else IN_VALUE).search(chunk, place)
                if found is None:
                    break
                place = found.end()
                if self.note(found[0]):
                    self.keep(chunk[kept : self.value_end(found)])
                    yield from self.finish(self.position + place)
                    kept = place
        self.keep(chunk[kept:] if self.depth else b"")
        self.position += len(chunk)

    def pass_string(self, chunk: bytes, place: int) -> int:
        """The byte after a string, or the end of the chunk."""
        found = STRING.match(chunk, place + self.escaped)
        end = found.end() if found else len(chunk)
        self.escaped = chunk[end : end + 1] == b"\\"
        self.in_string = end >= len(chunk) or self.escaped
        return end + 1

    def pass_outside(self, chunk: bytes, place: int) -> int:
        """Pass white space before and after the list, and the bracket that opens it."""
        rest = chunk[place:].lstrip(SPACE)
        if not rest:
            return len(chunk)
        place = len(chunk) - len(rest)
        if self.ended:
            self.fail(self.position + place, f"Extra data {rest[:1].decode(errors='replace')!r}")
        if rest[:1] != b"[":
            self.fail(self.position + place, "Expecting '['")
        self.depth = 1
        self.value_start = self.position + place + 1
        return place + 1

    def note(self, mark: bytes) -> bool:
        """Follow a bracket, comma or quote; whether it ends a value of the list."""
        if mark == b'"':
            self.in_string = True
        elif mark in b"[{":
            self.depth += 1
        elif mark in b"]}":
            self.depth -= 1
            self.ended = self.depth == 0
            return self.ended
        return mark == b","

    def value_end(self, mark: re.Match[bytes]) -> int:
        """The end of a value that a mark ends."""
        return mark.start()

    def keep(self, data: bytes) -> None:
        """Take more bytes of the value."""
        self.size += len(data)
        if self.size > self.limit:
            self.parts = []
        elif data:
            self.parts.append(data)

    def finish(self, after: int) -> Iterator[Span]:
        """The value that has ended; an empty list has none."""
        data = b"".join(self.parts) if self.size <= self.limit else None
        if not self.ended or self.count or data is None or data.strip(SPACE):
            yield Span(self.value_start, data)
        self.count += 1
        self.parts, self.size, self.value_start = [], 0, after

    def check_end(self) -> None:
        """Refuse a list that is cut short."""
        if not self.ended:
            problem = "the file ends in the record that begins here"
            self.fail(self.value_start, problem if self.depth else "Expecting '['")

    def fail(self, position: int, problem: str) -> None:
        """Stop at a byte of the file."""
        line = lines_before(self.path, position) + 1
        raise DataError(f"{self.path}:{line}: {problem}; repair the JSON list, or write JSONL")


class ObjectsScan(ListScan):
    """Follows objects that stand one after the other, over lines or on one."""

    commas_at = -1

    def __init__(self, path: str, start: int, limit: int) -> None:
        super().__init__(path, start, limit)
        self.depth = 0

    def pass_outside(self, chunk: bytes, place: int) -> int:
        """Pass white space between objects, and the bracket that opens one."""
        rest = chunk[place:].lstrip(SPACE)
        if not rest:
            return len(chunk)
        place = len(chunk) - len(rest)
        if rest[:1] != b"{":
            self.fail(self.position + place, "Expecting '{'")
        self.depth = 1
        self.value_start = self.position + place
        self.keep(b"{")
        return place + 1

    def note(self, mark: bytes) -> bool:
        """Follow a bracket or quote; whether it ends an object."""
        super().note(mark)
        ends, self.ended = self.ended, False
        return ends

    def value_end(self, mark: re.Match[bytes]) -> int:
        """The end of an object, its bracket included."""
        return mark.end()

    def check_end(self) -> None:
        """Refuse an object that is cut short."""
        if self.depth:
            self.fail(self.value_start, "the file ends in the record that begins here")
