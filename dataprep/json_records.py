"""Records of JSONL files and JSON lists."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from headrace.dataprep.records import Record, Reject, decode, json_type, refuse, refuse_large
from headrace.dataprep.streams import CHUNK_BYTES, Place, open_bytes, read_chunk, split_range
from headrace.dataprep.tasks import Columns, Piece
from headrace.schemas.errors import DataError

CUT_SHORT = 12  # a JSON error this near the end may come from the text being cut there
SPACE = " \t\n\r"
ENDS = tuple(",]" + SPACE)  # of a value; before anything else a number may go on


class Wanted(NamedTuple):
    """What is taken of parsed JSON: fields (None: all), and where a row that is a list belongs."""

    columns: Columns
    list_field: str | None = None


def read_lines(piece: Piece, wanted: Wanted, limit: int) -> Iterator[Record | Reject]:
    """JSONL: one object a line; lines of white space alone are no records."""
    first = piece.start == 0
    for place, data in split_range(piece.file.path, b"\n", piece.start, piece.end, limit):
        if data is None:
            first = False
            yield refuse_large(place, limit)
            continue
        line = data.removeprefix(codecs.BOM_UTF8) if first else data
        first = False
        if line.strip():
            text = decode(place, line)
            yield text if isinstance(text, Reject) else parse_line(text, place, wanted)


def parse_line(line: str, place: Place, wanted: Wanted) -> Record | Reject:
    """The record in one line of JSONL."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return refuse(place, "broken JSON", f"column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return refuse(place, "broken JSON", str(error))
    return take_fields(value, place, wanted, escaped="\\u" in line)


def read_json_list(piece: Piece, wanted: Wanted, limit: int) -> Iterator[Record | Reject]:
    """A JSON list of objects, parsed one after the other."""
    path = piece.file.path
    for number, value in enumerate(list_values(path, limit)):
        yield take_fields(value, Place(path, 0, number), wanted, escaped=True)


def take_fields(value: object, place: Place, wanted: Wanted, escaped: bool) -> Record | Reject:
    """The wanted fields of one parsed object.

    Args:
        escaped: whether the JSON has escapes, and so may hold half a surrogate pair.
    """
    if isinstance(value, list) and wanted.list_field is not None:
        value = {wanted.list_field: value}
    if not isinstance(value, dict):
        return refuse(place, "not an object", f"the record is {json_type(value)}")
    if wanted.columns is not None:
        value = {name: field for name, field in value.items() if name in wanted.columns}
    problem = find_surrogate(value) if escaped else None
    return refuse(place, "invalid UTF-8", problem) if problem else Record(value, place)


def find_surrogate(value: object) -> str | None:
    """Where a string in a JSON value is no Unicode text, or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"lone surrogate {value[error.start]!r} at character {error.start}"
    children: list[Any] = value if isinstance(value, list) else []
    if isinstance(value, dict):
        children = [*value, *value.values()]
    return next((problem for child in children if (problem := find_surrogate(child))), None)


def list_values(path: str, limit: int) -> Iterator[Any]:
    """The values of a JSON list, read as they are wanted; one value at a time is in memory.

    Raises:
        DataError: it is no JSON list, or a value has more than `limit` characters.
    """
    with open_bytes(path) as stream:
        text = ListText(path, stream, limit)
        text.expect("[")
        if text.next_character() == "]":
            text.advance(1)
        else:
            while True:
                yield text.value()
                if text.expect(",]") == "]":
                    break
        if rest := text.next_character():
            text.fail(text.start, f"Extra data {rest!r}")


class ListText:
    """A window over the text of a JSON list, which grows while a value is not complete in it."""

    def __init__(self, path: str, stream: Any, limit: int) -> None:
        self.path = path
        self.stream = stream
        self.limit = limit
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text = ""
        self.start = 0  # of what is not parsed yet
        self.line, self.column = 1, 1  # of the window's first character
        self.ended = False

    def more(self) -> bool:
        """Drop what is parsed and read at least as much again as is left; False at the end."""
        if self.ended:
            return False
        self.line, self.column = self.position(self.start)
        self.text = self.text[self.start :]
        self.start = 0
        data = read_chunk(self.stream, self.path, max(CHUNK_BYTES, len(self.text)))
        self.ended = not data
        try:
            self.text += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: cannot be parsed ({error}); repair it, or write JSONL"
            ) from None
        return True

    def position(self, index: int) -> tuple[int, int]:
        """Line and column in the file of a character of the window, both from 1."""
        lines = self.text.count("\n", 0, index)
        last = self.text.rfind("\n", 0, index)
        return self.line + lines, index - last if lines else self.column + index

    def next_character(self) -> str:
        """The next character that is no white space, empty at the end; it is not passed."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in SPACE:
                self.start += 1
            if self.start < len(self.text) or not self.more():
                return self.text[self.start : self.start + 1]

    def advance(self, count: int) -> None:
        """Pass some characters."""
        self.start += count

    def expect(self, characters: str) -> str:
        """Pass one of some characters."""
        found = self.next_character()
        if not found or found not in characters:
            self.fail(self.start, f"Expecting {' or '.join(map(repr, characters))}")
        self.advance(1)
        return found

    def value(self) -> Any:
        """Pass one value."""
        self.next_character()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                if (not unfinished and error.pos < len(self.text) - CUT_SHORT) or self.ended:
                    self.fail(error.pos, error.msg)
            except RecursionError as error:
                self.fail(self.start, str(error))
            else:
                following = self.text[end : end + CUT_SHORT]
                if following[:1] in ENDS or len(following) == CUT_SHORT or self.ended:
                    self.start = end
                    return value
            if len(self.text) - self.start > self.limit:
                self.fail(self.start, f"a value of more than max_record_bytes = {self.limit}")
            self.more()

    def fail(self, index: int, problem: str) -> None:
        """Stop at a character of the window."""
        line, column = self.position(index)
        raise DataError(
            f"{self.path}:{line}: column {column}: {problem}; repair the JSON list, or write JSONL"
        )
