"""Output of a command: a new file or directory, written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.schemas.publish import rename_durably


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
        ConfigError: the output exists.
    """
    check_new(output)
    temporary = output.with_name(f".{output.name}.tmp")
    remove(temporary)  # of a command that was killed
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
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
