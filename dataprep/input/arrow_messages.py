"""Sizes of the messages of an Arrow IPC file or stream, told before one of them is unpacked.

Messages are flatbuffers: https://flatbuffers.dev/internals/, with the tables of
https://github.com/apache/arrow/blob/main/format/Message.fbs and File.fbs.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from headrace.schemas.shards.unpacked_sizes import LARGE, is_bomb

MAGIC = b"ARROW1"
CONTINUED = 0xFFFFFFFF  # before the length of a message, since format 0.15
DICTIONARY, BATCH = 2, 3  # kinds of messages that have a body to unpack
HEADER_KIND, HEADER, BODY_BYTES = 1, 2, 3  # fields of Message
DICTIONARY_DATA = 1  # of DictionaryBatch
ROWS, NODES, BUFFERS, COMPRESSION = 0, 1, 2, 3  # of RecordBatch
FOOTER_BLOCKS = (2, 3)  # of Footer: dictionaries and batches
NODE = BUFFER = 16  # bytes of a struct
BLOCK = 24
RAW = -1  # stands for the size of a buffer that is not compressed


class Table(NamedTuple):
    """A table of a flatbuffer, at a byte of its content.

    Reading outside of the content raises struct.error.
    """

    content: bytes
    at: int

    def number(self, place: int, form: str) -> int:
        """The integer at a byte."""
        if place < 0:
            raise struct.error("a negative offset")
        return int(struct.unpack_from(f"<{form}", self.content, place)[0])

    def place(self, field: int) -> int | None:
        """Return where a field lies, or None where it has its default."""
        index = self.at - self.number(self.at, "i")
        slot = 4 + 2 * field
        offset = self.number(index + slot, "H") if slot < self.number(index, "H") else 0
        return self.at + offset if offset else None

    def value(self, field: int, form: str) -> int:
        """An integer field, 0 by default."""
        place = self.place(field)
        return 0 if place is None else self.number(place, form)

    def table(self, field: int) -> "Table | None":
        """A field that is a table."""
        place = self.place(field)
        return None if place is None else Table(self.content, place + self.number(place, "I"))

    def structs(self, field: int, size: int) -> Iterator[int]:
        """Yield where each struct of a list lies."""
        place = self.place(field)
        if place is None:
            return
        start = place + self.number(place, "I")
        for index in range(self.number(start, "I")):
            yield start + 4 + index * size


def root(content: bytes) -> Table:
    """The table that a flatbuffer begins with."""
    return Table(content, Table(content, 0).number(0, "I"))


def check_messages(stream: pa.NativeFile, large: int = LARGE) -> None:
    """Check that no batch or dictionary of a file unpacks to far more than it is.

    Args:
        large: see `unpacked_sizes.is_bomb`.

    Raises:
        ValueError: with the message's number and its sizes.
        OSError: it cannot be read.
    """
    size = stream.size()
    stream.seek(0)
    find = file_messages if stream.read(len(MAGIC)) == MAGIC else stream_messages
    try:
        for number, start in enumerate(find(stream, size)):
            check_message(stream, start, size, number, large)
    except struct.error as error:
        raise ValueError(f"its messages are damaged: {error}") from None


def stream_messages(stream: pa.NativeFile, size: int) -> Iterator[int]:
    """Yield where each message of a stream begins."""
    start = 0
    while start < size and (found := read_metadata(stream, start, size)):
        yield start
        metadata, body = found
        start = body + root(metadata).value(BODY_BYTES, "q")


def file_messages(stream: pa.NativeFile, size: int) -> Iterator[int]:
    """Yield where the messages of a file begin that its footer names."""
    stream.seek(max(0, size - len(MAGIC) - 4))
    (length,) = struct.unpack("<i", stream.read(4))
    if not 0 < length <= size:
        raise ValueError("its footer is damaged")
    stream.seek(max(0, size - len(MAGIC) - 4 - length))
    footer = root(stream.read(length))
    for blocks in FOOTER_BLOCKS:
        for block in footer.structs(blocks, BLOCK):
            yield footer.number(block, "q")


def read_metadata(stream: pa.NativeFile, start: int, size: int) -> tuple[bytes, int] | None:
    """The metadata of a message, and where its body begins; None at the end of a stream."""
    stream.seek(start)
    (length,) = struct.unpack("<I", stream.read(4))
    if length == CONTINUED:
        (length,) = struct.unpack("<I", stream.read(4))
        start += 4
    if not length:
        return None
    if length > size - start:
        raise ValueError("a message that goes on after the end of the file")
    return stream.read(length), start + 4 + length


def check_message(stream: pa.NativeFile, start: int, size: int, number: int, large: int) -> None:
    """Check one message."""
    found = read_metadata(stream, start, size)
    if found is None:
        return
    message, body = root(found[0]), found[1]
    kind, header = message.value(HEADER_KIND, "B"), message.table(HEADER)
    if kind == DICTIONARY and header is not None:
        header = header.table(DICTIONARY_DATA)
    if kind not in (DICTIONARY, BATCH) or header is None:
        return
    packed = message.value(BODY_BYTES, "q")
    if not 0 <= packed <= size - body:
        raise ValueError(f"message {number} goes on after the end of the file")
    values = [header.number(node, "q") for node in header.structs(NODES, NODE)]
    unpacked = sum(buffer_sizes(stream, header, body, packed))
    largest = max([header.value(ROWS, "q"), *values, unpacked])
    if is_bomb(packed, largest, large):
        raise ValueError(f"message {number} unpacks from {packed} to {largest} bytes or values")


def buffer_sizes(stream: pa.NativeFile, header: Table, body: int, packed: int) -> Iterator[int]:
    """The bytes of each buffer of a batch when it is unpacked."""
    buffers = list(header.structs(BUFFERS, BUFFER))
    content = b""
    if buffers and header.place(COMPRESSION) is not None:
        stream.seek(body)
        content = stream.read(packed)
    for buffer in buffers:
        offset, length = header.number(buffer, "q"), header.number(buffer + 8, "q")
        size = Table(content, 0).number(offset, "q") if content and length else RAW
        yield length if size == RAW else size
