"""Files that a file from elsewhere names: in their directory, and regular ones.

A name must not be absolute, hold `..`, or pass through a symbolic link that leaves the directory.
Links into the `blobs` folder of a Hugging Face hub cache are those that the cache is made of.
"""

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import shown


def check_plain(name: str) -> str:
    """Return a relative path that stays below the directory it is read from.

    Raises:
        ValueError: it does not.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or "\\" in name:
        raise ValueError(f"{shown(name)} is no path inside of the directory")
    return check_printable(name)


def check_printable(text: str) -> str:
    """Return text without control characters, which terminals obey.

    Raises:
        ValueError: it has one.
    """
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text):
        raise ValueError(f"{shown(text)} holds a control character")
    return text


PlainName = Annotated[str, AfterValidator(check_plain)]
PlainText = Annotated[str, AfterValidator(check_printable)]


def named_file(directory: Path, name: object, source: str) -> Path:
    """Return the path of a file of `directory`; it need not be there.

    Args:
        source: the file that names it, for the message.

    Raises:
        DataError: no name, or one that leads outside.
    """
    try:
        if not isinstance(name, str):
            raise ValueError(f"{shown(name)} is no file name")
        path = directory / check_plain(name)
    except ValueError as error:
        raise DataError(f"{directory / source}: {error}; it is not opened") from None
    check_inside(path, directory)
    return path


def check_inside(path: Path, directory: Path) -> None:
    """Check that links on the way to a file of a directory do not leave it.

    Raises:
        DataError: they do.
    """
    roots = [directory.resolve()]
    if roots[0].parent.name == "snapshots":  # of a hub cache
        roots.append(roots[0].parents[1] / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise DataError(
            f"{path}: a symbolic link that leaves its directory, to {shown(str(real))}; "
            "put the file itself there"
        )


def open_regular(path: Path) -> int:
    """Open a file for reading, without waiting for one that is no regular file.

    Returns:
        Its descriptor.

    Raises:
        DataError: a folder, FIFO, socket or device.
        OSError: it is not there, or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise irregular(path)
    return descriptor


def check_regular(path: Path) -> None:
    """Check that what is there, if anything is, is a regular file.

    Raises:
        DataError: a folder, FIFO, socket or device.
    """
    if path.exists() and not path.is_file():
        raise irregular(path)


def irregular(path: Path) -> DataError:
    """Return the error for what is there in place of a file."""
    return DataError(f"{path}: not a regular file; put the file itself there")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        DataError: none, it cannot be read, or it is larger.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes:,} bytes, the most that is read of it")
    return content
