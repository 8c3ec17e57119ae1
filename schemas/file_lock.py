"""A lock on what a process writes; the kernel frees it when that process ends, however it ends."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.schemas.errors import HeadraceError
from headrace.schemas.publish import writing

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of some network file systems
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
PID_BYTES = 32


@contextmanager
def file_lock(path: Path, refusal: Callable[[str], HeadraceError]) -> Iterator[None]:
    """Hold a lock file for this process; one that a dead process left behind is taken over.

    Where the file system has no locks, nothing is held.

    Args:
        refusal: makes the error from the number of the process that holds the lock.

    Raises:
        HeadraceError: another process holds it.
        OutputError: the file cannot be made.
    """
    descriptor = acquire(path, refusal)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()  # with the lock held, so that no other process has this file's
            os.close(descriptor)


def acquire(path: Path, refusal: Callable[[str], HeadraceError]) -> int | None:
    """Return the descriptor of the locked file; None where the file system has no locks."""
    while True:
        with writing(path, "choose another place"):
            descriptor = os.open(path, FLAGS, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, PID_BYTES).decode(errors="replace").strip()
            os.close(descriptor)
            raise refusal(holder or "unknown") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            raise
        if is_same_file(descriptor, path):
            note_holder(descriptor)
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and locking it


def note_holder(descriptor: int) -> None:
    """Write this process's number into the file, for messages; on a full disk it is left out."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
