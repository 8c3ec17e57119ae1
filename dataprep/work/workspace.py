"""`.work` inside the output: who holds the lock, and what finished tasks and shards left there."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from headrace.dataprep.work.budgets import Budgets
from headrace.schemas.errors import DataError
from headrace.schemas.file_lock import file_lock
from headrace.schemas.publish import create_file, remove_tree, rename_durably
from headrace.schemas.shards.shard_format import FILE_STEMS, REJECTS_FOLDER

WORK_FOLDER = ".work"
CONFIG_NAME = "prepare.json"
REJECTS_NAME = f"{REJECTS_FOLDER}/rejects.jsonl"

ValueT = TypeVar("ValueT", bound=BaseModel)


def work_folder(output: Path) -> Path:
    """Return the folder of unfinished work; it is gone once the directory is finished."""
    return output / WORK_FOLDER


def notes_folder(output: Path) -> Path:
    """Return the folder of running tasks' notes, which are looked through again and again."""
    return work_folder(output) / "notes"


def rows_path(output: Path, task: int, split: str) -> Path:
    """The sorted rows of one split of a finished task (Arrow IPC)."""
    return work_folder(output) / f"task-{task:06d}.{split}.arrow"


def rejects_path(output: Path, task: int) -> Path:
    """Return the path of the records that a finished task refused, as JSONL."""
    return work_folder(output) / f"task-{task:06d}.rejects.jsonl"


def marker_path(output: Path, name: str) -> Path:
    """The marker of a finished task or shard, written last."""
    return work_folder(output) / f"{name}.done.json"


@dataclass(frozen=True)
class Workspace:
    """An output, and the scratch folder in which the attempts of one run write.

    Work may be attempted several times at once, also by workers that outlive their run: each
    attempt writes under a name of its own and renames. The next run removes the scratch folders
    of earlier ones, after which their attempts can neither write nor rename any more.
    """

    output: Path
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    budgets: Budgets = field(default_factory=Budgets)

    @property
    def scratch(self) -> Path:
        """The run's scratch folder."""
        return work_folder(self.output) / f"scratch-{self.run}"

    def open(self) -> None:
        """Shut out attempts of earlier runs. Call it with the lock held."""
        for folder in work_folder(self.output).glob("scratch-*"):
            shutil.rmtree(folder)
        self.scratch.mkdir()
        notes_folder(self.output).mkdir(exist_ok=True)

    def temporary(self, path: Path) -> Path:
        """Return the path where one attempt writes what will be `path`."""
        return self.scratch / f"{path.name}.{uuid.uuid4().hex}"


class Marker(BaseModel):
    """Content of a marker: the key of the work it stands for, and its result."""

    key: str
    result: object


def write_marker(space: Workspace, name: str, key: str, result: BaseModel) -> None:
    """Declare a piece of work finished."""
    path = marker_path(space.output, name)
    unfinished = space.temporary(path)
    marker = Marker(key=key, result=result.model_dump(mode="json"))
    with create_file(unfinished) as file:
        file.write(marker.model_dump_json().encode())
    rename_durably(unfinished, path)


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

    def refusal(holder: str) -> DataError:
        return DataError(
            f"{output}: process {holder} is preparing it; wait for it, or set another output"
        )

    with file_lock(work_folder(output) / "lock", refusal):
        yield


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
