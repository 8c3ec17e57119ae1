"""`.work` inside the output: who holds the lock, and what finished tasks and shards left there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from headrace.schemas.errors import DataError
from headrace.schemas.publish import remove_tree, write_atomic
from headrace.schemas.shard_format import FILE_STEMS, REJECTS_FOLDER

WORK_FOLDER = ".work"
CONFIG_NAME = "prepare.json"
REJECTS_NAME = f"{REJECTS_FOLDER}/rejects.jsonl"

ValueT = TypeVar("ValueT", bound=BaseModel)


def work_folder(output: Path) -> Path:
    """Where unfinished work lies; gone once the directory is finished."""
    return output / WORK_FOLDER


def rows_path(output: Path, task: int, split: str) -> Path:
    """The sorted rows of one split of a finished task (Arrow IPC); absent where it has none."""
    return work_folder(output) / f"task-{task:06d}.{split}.arrow"


def rejects_path(output: Path, task: int) -> Path:
    """What a finished task refused, as JSONL."""
    return work_folder(output) / f"task-{task:06d}.rejects.jsonl"


def marker_path(output: Path, name: str) -> Path:
    """The marker of a finished task or shard, written last."""
    return work_folder(output) / f"{name}.done.json"


def temporary(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


class Marker(BaseModel):
    """What a marker holds: the key of the work it stands for, and its result."""

    key: str
    result: object


def write_marker(output: Path, name: str, key: str, result: BaseModel) -> None:
    """Declare a piece of work finished."""
    marker = Marker(key=key, result=result.model_dump(mode="json"))
    write_atomic(marker_path(output, name), marker.model_dump_json())


def read_marker(output: Path, name: str, key: str, kind: type[ValueT]) -> ValueT | None:
    """The result of finished work, or None if it is not finished or was other work."""
    try:
        marker = Marker.model_validate_json(marker_path(output, name).read_bytes())
        return kind.model_validate(marker.result) if marker.key == key else None
    except (FileNotFoundError, ValidationError):
        return None


def open_output(output: Path) -> None:
    """Make the output directory, or see that an existing one is ours to continue.

    Raises:
        DataError: it holds files that no prepare run wrote, or is no directory.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; set output to a directory")
    if output.is_dir() and any(output.iterdir()) and not work_folder(output).is_dir():
        raise DataError(
            f"{output}: holds other files and no unfinished run; set another output, or empty it"
        )
    work_folder(output).mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output for this process; the kernel frees the lock when the process dies.

    Raises:
        DataError: another process holds it.
    """
    path = work_folder(output) / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode() or "unknown"
        os.close(descriptor)
        raise DataError(
            f"{output}: process {holder} is preparing it; wait for it, or set another output"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def remove_work(output: Path) -> None:
    """Remove what only an unfinished run needs, also when an earlier removal was cut short."""
    if work_folder(output).is_dir():
        remove_tree(work_folder(output))
    half_removed = output / f".{WORK_FOLDER}.removed"
    if half_removed.is_dir():
        half_removed.rename(work_folder(output))
        remove_tree(work_folder(output))


def remove_stale_shards(output: Path, wanted: set[str]) -> None:
    """Remove shards of an unfinished run with another config."""
    for stem in FILE_STEMS.values():
        for path in output.glob(f"{stem}-*.parquet"):
            if path.name not in wanted:
                path.unlink()
