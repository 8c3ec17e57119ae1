"""Atomic publication: a reader sees all of a file or directory or none, even after a power cut."""

import errno
import fcntl
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path`, durably, once the block ends without an error."""
    remove_abandoned(path)
    temporary = temporary_name(path)
    try:
        with create_file(temporary) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
            yield file
            file.flush()
            rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that nobody can foresee, and so can put a link under."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` have left: nobody locks them."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent):  # noqa: PTH207
        try:
            descriptor = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # a link, or gone by now: none of ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path.parent / name).unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def create_file(path: Path) -> BinaryIO:
    """Create a file and open it for writing, with the mode that the umask leaves.

    Raises:
        FileExistsError: something has that name already, be it a symbolic link to nowhere.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def rename(temporary: Path, path: Path) -> None:
    """Give a file or directory another name, which may be one that is taken."""
    temporary.replace(path)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a finished file or directory into place; the new name survives a crash."""
    if temporary.is_dir():
        for child in sorted(temporary.rglob("*")):
            share_as_umask_says(child)
            fsync_path(child)
    fsync_path(temporary)
    rename(temporary, path)
    fsync_path(path.parent)


def share_as_umask_says(path: Path) -> None:
    """Give a file that a library wrote for its owner alone the mode of every other new file.

    safetensors writes weights with mode 0600, whatever the umask.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) != 0o600:
        return
    mode = 0o666 & ~umask()
    if mode != 0o600:
        path.chmod(mode)


def umask() -> int:
    """Return the umask of this process without changing it; 0o077 where the system hides it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0o077
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o077)


def rename_together(files: Sequence[tuple[Path, Path]]) -> None:
    """The same for several files of one directory, with fewer waits for the disk."""
    for temporary, _ in files:
        fsync_path(temporary)
    for temporary, path in files:
        rename(temporary, path)
    fsync_path(files[0][1].parent)


def remove_tree(path: Path) -> None:
    """Remove a directory so that a half-removed one is never taken for a whole one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    rename(path, doomed)
    shutil.rmtree(doomed)
