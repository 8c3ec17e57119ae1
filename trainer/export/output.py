"""Output of a command: a new file or directory, written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.schemas.file_lock import file_lock
from headrace.schemas.publish import NO_ROOM, rename_durably, writing


def check_new(output: Path) -> None:
    """Nothing is overwritten.

    Raises:
        ConfigError: the output exists.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already; remove it or choose another --output")


@contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """A name to make a file or directory under; it becomes `output`, or is gone if that failed.

    Raises:
        ConfigError: the output exists, or another process is writing it.
        OutputError: it cannot be written.
    """
    check_new(output)
    with writing(output.parent, "choose another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)

    def refusal(holder: str) -> ConfigError:
        return ConfigError(f"{output}: process {holder} is writing it; choose another --output")

    temporary = output.with_name(f".{output.name}.tmp")
    with file_lock(output.with_name(f".{output.name}.lock"), refusal):
        check_new(output)  # another command may just have finished it
        remove(temporary)  # of a command that was killed
        try:
            with writing(output, "make room, and run the command again", only=NO_ROOM):
                yield temporary
                rename_durably(temporary, output)
        finally:
            remove(temporary)


def remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
