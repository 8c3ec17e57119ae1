"""Upload of a run's result to the Hugging Face hub."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.schemas.checkpoint_names import CHECKPOINTS_FOLDER, published_checkpoints
from headrace.schemas.errors import ConfigError, DataError, HeadraceError, install_hint
from headrace.schemas.train.run_state import RUN_CONFIG_NAME, read_run_state

Part = Literal["adapter", "model", "checkpoint"]
LEFT_OUT = (".lock", ".git", ".cache", "tensorboard", "profile")


@dataclass(frozen=True)
class Upload:
    """A folder, its files by name in the repository, and their sizes in bytes."""

    folder: Path
    prefix: str  # folder in the repository; empty: its root
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(self.files.values())


def choose(result: Path, part: Part | None) -> Upload:
    """Return what of a run, or of a directory with a result, is to be uploaded.

    Args:
        part: default: the model or the adapter, whichever the run has made.

    Raises:
        ConfigError: it is not there.
        CheckpointError: the newest checkpoint is damaged.
    """
    if not result.is_dir():
        raise ConfigError(f"{result}: no such directory; name a run or a result")
    if part == "checkpoint":
        found = published_checkpoints(result / CHECKPOINTS_FOLDER)
        if not found:
            raise ConfigError(
                f"{result / CHECKPOINTS_FOLDER}: no checkpoints; name a run directory"
            )
        read_run_state(found[-1])  # every file is hashed
        return listed(found[-1], f"{CHECKPOINTS_FOLDER}/{found[-1].name}")
    if not (result / RUN_CONFIG_NAME).is_file():
        return listed(result, "")
    wanted = [part] if part else ["model", "adapter"]
    for name in wanted:
        if (result / name).is_dir():
            return listed(result / name, "")
    raise ConfigError(f"{result}: no {' and no '.join(wanted)} there; has the run come to its end?")


def listed(folder: Path, prefix: str) -> Upload:
    """Return a folder's files.

    Raises:
        DataError: there are none, or one that leads out of the folder.
    """
    files = {str(path.relative_to(folder)): path.stat().st_size for path in files_of(folder)}
    if not files:
        raise DataError(f"{folder}: no files to upload")
    return Upload(folder, prefix, files)


def files_of(folder: Path) -> Iterator[Path]:
    """Yield regular files in a fixed order, logs and locks left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(name for name in names if name not in LEFT_OUT):
            path = Path(place, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise DataError(f"{path}: is a link or no regular file; put the file itself there")
            yield path


def push(
    upload: Upload, repository: str, revision: str | None, message: str, *, public: bool
) -> str:
    """Create the repository if need be, and upload in one commit; returns its address.

    Raises:
        ConfigError: huggingface_hub is not installed, or the name is none.
        PushError: the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError:
        raise ConfigError(f"huggingface_hub is not installed; {install_hint('remote')}") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=upload.folder,
            path_in_repo=upload.prefix or None,
            allow_patterns=list(upload.files),
            commit_message=message,
            revision=revision,
        )
    except HFValidationError as error:
        raise ConfigError(f"{repository}: {first_line(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise PushError(
            f"{repository}: not uploaded ({first_line(error)}); look at the name, and log in with "
            "`hf auth login` or HF_TOKEN"
        ) from None
    return str(commit.commit_url)


class PushError(HeadraceError):
    """The hub did not take an upload."""


def first_line(error: Exception) -> str:
    """Return the first line of an error that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
