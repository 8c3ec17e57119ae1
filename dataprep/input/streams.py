"""Bytes of input files: decompressed as they are read, cut at separators in passing."""

import functools
import lzma
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from headrace.dataprep.input.records import Place, Reject
from headrace.dataprep.input.remote import is_remote, open_remote
from headrace.schemas.errors import DataError, redact

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks


def compression(path: str) -> str | None:
    """Return the compression of a file, by its name."""
    return COMPRESSIONS.get(Path(without_query(path)).suffix.lower())


def without_query(path: str) -> str:
    """A path, or a URL without what stands behind its path."""
    return path.partition("?")[0] if is_remote(path) else path


def open_bytes(path: str) -> pa.NativeFile:
    """A readable stream of a file's decompressed bytes."""
    kind = compression(path)
    if not is_remote(path) and kind != "xz":
        return pa.input_stream(path, compression=kind)
    stream = open_random(path)
    return stream if kind is None else decompressed(stream, kind)


def decompressed(stream: pa.NativeFile, kind: str) -> pa.NativeFile:
    """The bytes that a compressed stream holds, as a stream."""
    if kind == "xz":  # Arrow has no such codec
        return pa.PythonFile(lzma.LZMAFile(stream), mode="r")
    return pa.CompressedInputStream(stream, kind)


def read_chunk(stream: pa.NativeFile, path: str, size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end.

    Raises:
        DataError: the compressed data is damaged or ends too early.
    """
    try:
        return bytes(stream.read(size))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); replace the file") from None


def open_random(path: str) -> pa.NativeFile:
    """A file as it is, readable from any byte."""
    return open_remote(path) if is_remote(path) else pa.OSFile(path)


def read_all(path: str, limit: int) -> bytes | None:
    """A whole file, decompressed; None if it has more than `limit` bytes."""
    chunks: list[bytes] = []
    size = 0
    with open_bytes(path) as stream:
        while chunk := read_chunk(stream, path, CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                return None
    return b"".join(chunks)


@functools.lru_cache(maxsize=4)
def lines_before(path: str, offset: int) -> int:
    """Newlines in the first `offset` bytes: only counted when a record is refused."""
    if not offset:
        return 0
    count = 0
    with open_bytes(path) as stream:
        while offset and (chunk := read_chunk(stream, path, min(CHUNK_BYTES, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def line_of(place: Place, further: int = 0) -> int:
    """The line of a place in its file, from 1, `further` lines down."""
    return lines_before(place.file, place.start) + place.line + further + 1


def refuse(place: Place, reason: str, detail: str, further: int = 0) -> Reject:
    """A reject at a place, `further` lines down."""
    return Reject(redact(place.file), line_of(place, further), reason, detail)


def refuse_bytes(place: Place, error: UnicodeDecodeError, further: int = 0) -> Reject:
    """A record that is no UTF-8."""
    detail = f"byte 0x{error.object[error.start]:02x} at byte {error.start} of the document"
    if error.object.startswith(UTF_16):
        detail += "; it is UTF-16, write it as UTF-8"
    return refuse(place, "invalid UTF-8", detail, further)


def refuse_large(place: Place, limit: int) -> Reject:
    """A record that memory might not hold once it is tokenized."""
    return refuse(place, "too large", f"more than max_record_bytes = {limit}")


def decode(place: Place, data: bytes) -> str | Reject:
    """Strict UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return refuse_bytes(place, error, data.count(b"\n", 0, error.start))


def split_range(
    path: str,
    separator: bytes,
    start: int,
    end: int | None,
    limit: int,
    blanks: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[Place, bytes | None]]:
    """The records of a file whose first byte lies in [start, end), without their separators.

    Ranges that tile a file give the records of the whole file, each once. What follows the last
    separator is a record unless it is empty. None stands for a record of more than `limit` bytes.

    A byte order mark at the file's start belongs to no record.

    Args:
        start, end: bytes; only uncompressed files may start elsewhere than at 0 or have an end.
        blanks: give empty records too. Without them a file of line ends alone is read at the
            speed of the disk.
        chunk_bytes: are read at once, more only where a record has more.
    """
    if start:
        start = first_record(path, separator, start, end, chunk_bytes)
    with open_bytes(path) as stream:
        if start:
            stream.seek(start)
        records = split_stream(stream, path, separator, start, end, limit, blanks, chunk_bytes)
        yield from records if start else without_mark(records)


def without_mark(
    records: Iterator[tuple[Place, bytes | None]],
) -> Iterator[tuple[Place, bytes | None]]:
    """The records of a whole file, the first without a byte order mark."""
    for place, data in records:
        yield place, data.removeprefix(BOM) if data is not None else None
        break
    yield from records


def split_stream(
    stream: pa.NativeFile,
    path: str,
    separator: bytes,
    start: int,
    end: int | None,
    limit: int,
    blanks: bool,
    chunk_bytes: int,
) -> Iterator[tuple[Place, bytes | None]]:
    """Records from the stream's position `start` on, up to the last that begins before `end`."""
    position, line, rest = start, 0, b""
    own_lines = 0 if separator == b"\n" else None  # in a record, where that need not be counted
    dropped, dropped_lines = 0, 0  # of the record that `rest` ends, and that is too large
    while end is None or position < end:
        # a record longer than a chunk doubles the next read, so that joining stays linear
        chunk = read_chunk(stream, path, max(chunk_bytes, len(rest)))
        data = rest + chunk
        if not (blanks or dropped) and data.isspace():
            cut = data.rfind(separator) + len(separator) if separator in data else 0
            position += cut
            line += data.count(b"\n", 0, cut)
            data = data[cut:]
        records = data.split(separator)
        rest = records.pop()
        for record in records:
            if end is not None and position >= end:
                return
            if not (record or blanks or dropped):
                position += len(separator)
                line += separator.count(b"\n")
                continue
            large = dropped > 0 or len(record) > limit
            yield Place(path, start, line), None if large else record
            position += dropped + len(record) + len(separator)
            inner = record.count(b"\n") if own_lines is None else own_lines
            line += dropped_lines + inner + separator.count(b"\n")
            dropped, dropped_lines = 0, 0
        if not chunk:
            break
        cut = len(rest) - len(separator) + 1  # what follows may be a part of a separator
        if dropped + cut > limit:
            dropped, dropped_lines = dropped + cut, dropped_lines + rest.count(b"\n", 0, cut)
            rest = rest[cut:]
    if (rest or dropped) and (end is None or position < end):
        yield Place(path, start, line), None if dropped + len(rest) > limit else rest


def first_record(
    path: str,
    separator: bytes,
    offset: int,
    end: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """The first byte at or after `offset` at which a record begins; the size if none does.

    One at or after `end` is of no interest: the search stops there, at any byte from `end` on.
    """
    with open_random(path) as file:
        position = unambiguous_start(path, separator, max(0, offset - len(separator)))
        file.seek(position)
        data = b""
        while chunk := file.read(max(chunk_bytes, len(data))):
            data += chunk
            *records, rest = data.split(separator)
            for record in records:
                position += len(record) + len(separator)
                if position >= offset:
                    return position
            cut = max(0, len(rest) - len(separator) + 1)  # no separator begins before
            position += cut
            if end is not None and position >= end:
                return position
            data = rest[cut:]
        return position + len(data)


def unambiguous_start(path: str, separator: bytes, position: int) -> int:
    """A place at or before `position` from which cutting agrees with cutting from the file's start.

    A separator may overlap itself (a blank line in "\\n\\n\\n"); cutting goes from left to
    right, so the search must begin before the whole run of overlapping separators.
    """
    width = len(separator) - 1
    with open_random(path) as file:
        while width and position:
            begin = max(0, position - width)
            file.seek(begin)
            found = file.read(position - begin + width).find(separator)
            if found < 0 or begin + found >= position:
                break
            position = begin + found
    return position
