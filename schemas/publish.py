"""Atomic publication: a reader sees all of a file or directory or none, even after a power cut."""

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headrace.schemas.errors import OutputError

# what only writing can meet: no room, a quota, a read-only disk, too large a file
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextmanager
def writing(path: Path | str, remedy: str, *, only: Collection[int] = ()) -> Iterator[None]:
    """Turn what the system says against writing into one line with the file's name.

    Args:
        path: the file; or the directory of several, for what the system gives no name.
        only: error numbers that are turned, of any file; others pass. Empty turns all.

    Raises:
        OutputError: something cannot be written.
    """
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        place = error.filename or path if only else path
        raise OutputError(explain_os_error(error, place, remedy)) from None


def explain_os_error(error: OSError, path: Path | str, remedy: str) -> str:
    """Return the file, the system's reason, and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{path}: cannot be written ({reason}); {remedy}"


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, make it durable, then rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    rename_durably(temporary, path)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a finished file or directory into place; the new name survives a crash."""
    if temporary.is_dir():
        for child in sorted(temporary.rglob("*")):
            fsync_path(child)
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


def rename_together(files: Sequence[tuple[Path, Path]]) -> None:
    """The same for several files of one directory, with fewer waits for the disk."""
    for temporary, _ in files:
        fsync_path(temporary)
    for temporary, path in files:
        temporary.replace(path)
    fsync_path(files[0][1].parent)


def remove_tree(path: Path) -> None:
    """Remove a directory so that a half-removed one is never taken for a whole one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed)
