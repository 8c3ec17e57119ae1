"""Atomic publication: a reader sees all of a file or directory or none, even after a power cut."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path


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
