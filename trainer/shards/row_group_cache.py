"""A folder of fetched bytes, shared by the processes of a node, whoever of them is killed when."""

import errno
import fcntl
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

STRIPES = 256  # locks for fetching; two pieces in one stripe only wait for each other
POLL_SECONDS = 0.01
PUBLISH_SECONDS = 2.0  # longest wait for another process that publishes or removes
CHECKSUM_BYTES = 4
SPARE = 16  # a removal frees one part in so many, for it has to look at every file
SUFFIX = ".piece"


class RowGroupCache:
    """Pieces of files by content: the file's SHA-256, offset and size.

    Every piece ends in its CRC-32, is published by rename and checked when read, so what a killed
    process or a full disk left is never taken for one. Locks are the kernel's (flock) and go with
    their process. A cache that cannot be written is read on, after one warning.

    Args:
        limit: bytes of all pieces together; the least recently used ones are removed first.
        patience: seconds to wait for another process that fetches the same piece.
    """

    def __init__(self, directory: Path, limit: int, patience: float) -> None:
        self.directory = directory
        self.limit = limit
        self.patience = patience
        self.writable = True
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)

    def get(self, sha256: str, offset: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes, from the folder if they are there, else from `fetch`.

        One process of the node fetches a piece; the others wait for it, or for its end.
        """
        name = hashlib.sha256(f"{sha256}:{offset}:{size}".encode()).hexdigest() + SUFFIX
        content = self._read(name, size)
        if content is not None:
            return content
        with self._lock(f"fetch-{int(name[:8], 16) % STRIPES:02x}.lock", self.patience):
            content = self._read(name, size)
            if content is None:
                content = fetch()
                if len(content) == size:
                    self._publish(name, content)
        return content

    def _read(self, name: str, size: int) -> bytes | None:
        """A whole piece, marked as just used; None if it is not there or not what was written."""
        path = self.directory / name
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        content, checksum = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:]
        if len(content) != size or checksum_of(content) != checksum:
            logger.warning("%s: damaged; fetched again", path)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # removed meanwhile, or a read-only folder
            os.utime(path)
        return content

    def _publish(self, name: str, content: bytes) -> None:
        """Write under the folder's lock, so that a half-written file is always a dead process's."""
        size = len(content) + CHECKSUM_BYTES
        if not self.writable or size > self.limit:
            return
        incoming = self.directory / "incoming"
        with self._lock("publish.lock", PUBLISH_SECONDS) as locked:
            if not locked:
                return
            try:
                self._make_room(size)
                with incoming.open("wb", buffering=0) as file:
                    write_all(file.fileno(), content)
                    write_all(file.fileno(), checksum_of(content))
                incoming.replace(self.directory / name)
            except OSError as error:
                incoming.unlink(missing_ok=True)
                self._give_up(error)

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes in; when that is too many, remove the least recently used.

        The count is written before the piece is there, so a killed process can only leave it too
        high, until the next removal counts anew.
        """
        counter = self.directory / "bytes"
        try:
            total = int(counter.read_text()) + size
        except (OSError, ValueError):
            total = self.limit + 1  # not known: count
        if total > self.limit:
            total = self._remove_oldest(size) + size
        counter.write_text(str(total))

    def _remove_oldest(self, size: int) -> int:
        """Remove pieces until `size` bytes and a share to spare are free; returns what is left."""
        pieces = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    facts = entry.stat()
                    pieces.append((facts.st_mtime_ns, facts.st_size, entry.path))
        total = sum(length for _, length, _ in pieces)
        wished = self.limit - max(size, self.limit // SPARE)
        if total + size <= self.limit:
            return total
        for _, length, path in sorted(pieces):
            if total <= wished:
                break
            Path(path).unlink(missing_ok=True)
            total -= length
        return total

    @contextmanager
    def _lock(self, name: str, seconds: float) -> Iterator[bool]:
        """Hold a lock file, or go on without it (False) when another process keeps it too long."""
        try:
            descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            self._give_up(error)
            yield False
            return
        try:
            yield wait_for_lock(descriptor, seconds)
        finally:
            os.close(descriptor)

    def _give_up(self, error: OSError) -> None:
        if self.writable:
            self.writable = False
            hint = "; free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
            logger.warning(
                "%s: cannot be written (%s); going on without caching%s",
                self.directory,
                error.strerror or error,
                hint,
            )


def checksum_of(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte; a short write is followed by the error that cut it short."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def wait_for_lock(descriptor: int, seconds: float) -> bool:
    """Take an flock within so many seconds; it ends with the descriptor or the process."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True
