"""The directory of a run, made and held by the one process that writes there. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.schemas.file_lock import file_lock
from headrace.schemas.publish import NO_ROOM, writing

LOCK_NAME = ".lock"


@contextmanager
def open_run_directory(directory: Path, *, writes: bool) -> Iterator[None]:
    """Make a run's directory and hold it for this process; a new one that stays empty is removed.

    Args:
        writes: whether this process writes there; the others only turn errors into lines.

    Raises:
        ConfigError: another process trains there, or it is a file.
        OutputError: it cannot be made, or there is no room in it.
    """
    with writing(directory, "make room, or make it writable, then --resume", only=NO_ROOM):
        if not writes:
            yield
            return
        is_new = not directory.exists()
        make_directory(directory)
        try:
            with file_lock(directory / LOCK_NAME, lambda holder: held(directory, holder)):
                yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty
                    directory.rmdir()


def make_directory(directory: Path) -> None:
    """Make a run's directory, its parents included.

    Raises:
        ConfigError: it is a file.
        OutputError: it cannot be made.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: is a file; set output_dir to a directory")
    with writing(directory, "set output_dir to another directory"):
        directory.mkdir(parents=True, exist_ok=True)


def held(directory: Path, holder: str) -> ConfigError:
    """Return the error for a directory in which another process trains."""
    return ConfigError(
        f"{directory}: process {holder} trains there; wait for its end, or set another output_dir"
    )
