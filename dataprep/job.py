"""What every worker is told, and the keys that decide whether finished work may be reused."""

from dataclasses import dataclass
from pathlib import Path

from headrace.dataprep.inputs import InputFile
from headrace.dataprep.remote import describe_remote, is_remote
from headrace.dataprep.tasks import Task
from headrace.dataprep.tokenizer import TokenizerSpec
from headrace.dataprep.workspace import Workspace
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare_config import PrepareConfig

ROWS_VERSION = 1  # raise it when the same config would give other rows
PLACES = {"output", "tokenizer"}
DECIDED_LATER = {"sources", "shards", "row_group_tokens", "max_reject_fraction"}


@dataclass(frozen=True)
class Job:
    """One run of prepare; small and picklable."""

    config: PrepareConfig
    tokenizer: TokenizerSpec
    space: Workspace

    @property
    def output(self) -> Path:
        """The shard directory."""
        return self.space.output

    def settings(self) -> dict[str, object]:
        """The resolved config without the machine's paths, and the tokenizer's identity instead."""
        return {
            "version": ROWS_VERSION,
            "config": self.config.model_dump(mode="json", exclude=PLACES),
            "tokenizer": self.tokenizer.identity(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of all settings: the manifest's config fingerprint."""
        return fingerprint(self.settings())

    def task_key(self, task: Task) -> str:
        """What a task's rows depend on: settings that matter only later are left out."""
        config = self.config.model_dump(mode="json", exclude=PLACES | DECIDED_LATER)
        names = [source.name for source in self.config.sources]
        return fingerprint(
            [ROWS_VERSION, config, names, self.tokenizer.identity(), task.number, task.identity()]
        )


def changed(file: InputFile) -> bool:
    """Whether a file is no longer what it was when the work was planned."""
    if is_remote(file.path):
        return describe_remote(file.path) != (file.size, file.mtime_ns)
    try:
        status = Path(file.path).stat()
    except OSError:
        return True
    return (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns)
