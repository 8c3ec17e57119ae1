"""Scan for the records of a CSV file from its start, in bounded memory.

A line break may stand in quotes, so this cannot be told from the middle of a file. The rules are
those of Python's `csv` with `strict=True`, byte by byte: a quote opens a field only at its start,
and after an error the next line begins a new record.
"""

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from headrace.dataprep.input.streams import BOM, CHUNK_BYTES, open_bytes, read_chunk

QUOTE = ord('"')
IN_QUOTES = re.compile(rb'[^"]*(?:""[^"]*)*')  # up to a quote that may close the field


class State(Enum):
    """Kind of field that the next byte of a line belongs to."""

    START = auto()  # the first byte of a field
    PLAIN = auto()
    QUOTED = auto()
    CLOSING = auto()  # after a quote in a quoted field
    LOST = auto()  # after a carriage return or an error: nothing matters before the line's end


class Span(NamedTuple):
    """A record: its first byte, the lines before it since the scan's start, and its bytes.

    `data` is None where there are more than wanted. `open` says that the file ends in quotes.
    """

    start: int
    line: int
    data: bytes | None
    open: bool


def scan_csv(
    path: str, delimiter: str, start: int, limit: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Span]:
    """The records of a file from byte `start` on, at which one begins; blank lines are records.

    Args:
        limit: bytes of a record above which they are not kept.
        chunk_bytes: are read at once.
    """
    scan = CsvScan(delimiter, start, limit)
    with open_bytes(path) as stream:
        if start:
            stream.seek(start)
        while chunk := read_chunk(stream, path, max(chunk_bytes, len(BOM))):
            yield from scan.records(chunk)
    yield from scan.rest()


class CsvScan:
    """Follows quotes, delimiters and line ends, chunk by chunk."""

    def __init__(self, delimiter: str, start: int, limit: int) -> None:
        sign = re.escape(delimiter.encode())
        self.delimiter = ord(delimiter)
        self.plain_end = re.compile(b"[\r\n]|" + sign + b'"')
        self.limit = limit
        self.state = State.START
        self.position = start  # of the chunk
        self.start = start  # of the record
        self.line = 0
        self.parts: list[bytes] = []
        self.size = 0
        self.lines = 0

    def records(self, chunk: bytes) -> Iterator[Span]:
        """The records that end in a chunk."""
        place = kept = 0  # the next byte to look at; the first that is not kept yet
        if self.position == 0 and chunk.startswith(BOM):
            self.start = place = kept = len(BOM)
        while place < len(chunk):
            place, ends = self.step(chunk, place)
            if ends:
                self.keep(chunk, kept, place)
                yield from self.rest()
                kept = place
        self.keep(chunk, kept, len(chunk))
        self.position += len(chunk)

    def step(self, chunk: bytes, place: int) -> tuple[int, bool]:
        """Pass the bytes up to the next that matters; whether a record ends there."""
        match self.state:
            case State.START if chunk[place] == QUOTE:
                self.state = State.QUOTED
                return place + 1, False
            case State.START | State.PLAIN:
                return self.pass_plain(chunk, place)
            case State.QUOTED:
                found = IN_QUOTES.match(chunk, place)
                end = found.end() if found else len(chunk)
                self.state = State.QUOTED if end == len(chunk) else State.CLOSING
                return end + 1, False
            case State.CLOSING:
                follows = {QUOTE: State.QUOTED, self.delimiter: State.START}
                self.state = follows.get(chunk[place], State.LOST)
                return place + (self.state is not State.LOST), False
            case State.LOST:
                end = chunk.find(b"\n", place)
                return (len(chunk), False) if end < 0 else (end + 1, True)

    def pass_plain(self, chunk: bytes, place: int) -> tuple[int, bool]:
        """Pass fields without quotes, up to a quoted one or the end of the line."""
        if chunk[place] == self.delimiter and self.state is State.START:
            return place + 1, False
        found = self.plain_end.search(chunk, place)
        if found is None:
            self.state = State.START if chunk[-1] == self.delimiter else State.PLAIN
            return len(chunk), False
        if found[0] == b"\n":
            return found.end(), True
        self.state = State.LOST if found[0] == b"\r" else State.QUOTED
        return found.end(), False

    def keep(self, chunk: bytes, start: int, end: int) -> None:
        """Take more bytes of the record."""
        self.size += end - start
        self.lines += chunk.count(b"\n", start, end)
        if self.size > self.limit:
            self.parts = []
        elif end > start:
            self.parts.append(chunk[start:end])

    def rest(self) -> Iterator[Span]:
        """Yield the bytes kept so far as a record; the next one begins behind it."""
        if self.size:
            data = b"".join(self.parts) if self.size <= self.limit else None
            yield Span(self.start, self.line, data, self.state is State.QUOTED)
        self.start, self.line = self.start + self.size, self.line + self.lines
        self.parts, self.size, self.lines, self.state = [], 0, 0, State.START
