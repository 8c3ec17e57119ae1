"""The job that every worker is told, and the keys that decide if finished work may be reused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.dataprep.input.pieces import InputFile, Task
from headrace.dataprep.input.remote import describe_remote, is_remote
from headrace.dataprep.text.row_format import Format
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.dataprep.work.workspace import Workspace
from headrace.schemas.addresses import recorded
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig

ROWS_VERSION = 3  # raise it when the same config would give other rows
WITHOUT_EFFECT = {"output", "tokenizer", "tokenizer_backend"}  # on any row
DECIDED_LATER = {
    "sources",
    "shards",
    "row_group_tokens",
    "max_reject_fraction",
    "max_rows",
    "max_tokens",
}


def recorded_config(config: PrepareConfig) -> dict[str, object]:
    """Return what of a config decides rows, with its addresses as they may be saved."""
    values = deciding(config, WITHOUT_EFFECT)
    if images := values.get("images"):
        folder = images["folder"]
        images["folder"] = None if folder is None else recorded(folder)
        images["addresses"] = [recorded(address) for address in images["addresses"]]
    if sets := values["decontaminate"]:
        sets["paths"] = [recorded(path) for path in sets["paths"]]
    for source in values["sources"]:
        paths = source["path"]
        one = isinstance(paths, str)
        source["path"] = recorded(paths) if one else [recorded(path) for path in paths]
    return values


def deciding(config: PrepareConfig, without: set[str]) -> dict[str, Any]:
    """Return a config less some keys, and less the path of a vision model: what its files say is in
    the identity.
    """
    values = config.model_dump(mode="json", exclude=without)
    if values.get("images") is None:
        values.pop("images", None)
    else:
        del values["images"]["model"]
    return values


@dataclass(frozen=True)
class Corpus:
    """The documents of all sources, once they have been seen: their key and the parts to search."""

    key: str
    tasks: int
    parts: int


@dataclass(frozen=True)
class Context:
    """One run of prepare; small and picklable. `corpus` is set once duplicates are known."""

    config: PrepareConfig
    tokenizer: TokenizerSpec
    space: Workspace
    build_format: Callable[[PrepareConfig, SourceConfig, TokenizerSpec], Format]
    corpus: Corpus | None = None

    @property
    def output(self) -> Path:
        """The shard directory."""
        return self.space.output

    def row_format(self, source: SourceConfig) -> Format:
        """Return what turns the rows of a source into samples; build it once for each task."""
        return self.build_format(self.config, source, self.tokenizer)

    def settings(self) -> dict[str, object]:
        """The resolved config without paths and tokenizer; the tokenizer's identity instead."""
        return {
            "version": ROWS_VERSION,
            "config": recorded_config(self.config),
            "tokenizer": self.tokenizer.identity(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of all settings: the manifest's config fingerprint."""
        return fingerprint(self.settings())

    def task_key(self, task: Task) -> str:
        """Return the key of a task's rows: settings that matter only later are left out."""
        config = deciding(self.config, WITHOUT_EFFECT | DECIDED_LATER)
        names = [source.name for source in self.config.sources]
        corpus = None if self.corpus is None else self.corpus.key
        return fingerprint(
            [
                ROWS_VERSION,
                config,
                names,
                self.tokenizer.identity(),
                task.number,
                task.identity(),
                corpus,
            ]
        )


def changed(file: InputFile) -> bool:
    """Return whether a file differs from what it was when the work was planned."""
    if is_remote(file.path):
        return describe_remote(file.path) != (file.size, file.mtime_ns)
    try:
        status = Path(file.path).stat()
    except OSError:
        return True
    return (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns)


def check_unchanged(task: Task) -> None:
    """Refuse rows of which part may come from another version of a file.

    Raises:
        DataError: a file is no longer what it was when the work was planned.
    """
    for piece in task.pieces:
        if changed(piece.file):
            raise DataError(f"{piece.file.path}: changed while it was read; run again")
