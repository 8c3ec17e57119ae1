"""Shard directories wherever they lie: local paths, or URLs that pyarrow or fsspec open."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from headrace.schemas.addresses import check_address
from headrace.schemas.errors import ConfigError, DataError, redact
from headrace.schemas.file_systems import open_filesystem
from headrace.schemas.named_files import open_regular
from headrace.schemas.retries import Patience
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import missing_manifest, parse_manifest, read_manifest
from headrace.schemas.shards.shard_format import MANIFEST_NAME
from headrace.schemas.train.data_config import LoaderConfig

OPEN_FILES = 32
MOST_MANIFEST_BYTES = 1 << 30


class Storage(Protocol):
    """One shard directory."""

    remote: bool

    def name(self, file: str) -> str:
        """A file's path or URL, for messages."""

    def manifest(self) -> Manifest:
        """The directory's manifest."""

    def sizes(self, files: list[str]) -> list[int | None]:
        """Bytes of each file; None where there is none."""

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; fewer where it ends before.

        Raises:
            FileNotFoundError, OSError: local damage; StorageError: a storage that does not answer.
        """


def patience_of(config: LoaderConfig) -> Patience:
    """Return the retry policy that the config asks for."""
    return Patience(config.read_attempts, config.read_timeout)


def open_storage(path: str, patience: Patience) -> Storage:
    """The storage of a shard directory: a URL with a scheme is remote, all else a local path."""
    return RemoteStorage(path, patience) if "://" in path else LocalStorage(Path(path))


def check_no_keys(url: str) -> None:
    """Refuse an address that holds credentials."""
    try:
        check_address(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None


class LocalStorage:
    """A folder of this machine, or mounted on it."""

    remote = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def name(self, file: str) -> str:
        return str(self.directory / file)

    def manifest(self) -> Manifest:
        return read_manifest(self.directory)

    def sizes(self, files: list[str]) -> list[int | None]:
        paths = [self.directory / file for file in files]
        return [path.stat().st_size if path.is_file() else None for path in paths]

    def read(self, file: str, offset: int, size: int) -> bytes:
        with os.fdopen(open_regular(self.directory / file), "rb", buffering=0) as source:
            source.seek(offset)
            parts = []
            while size and (part := source.read(size)):
                parts.append(part)
                size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class RemoteStorage:
    """A folder behind a URL, read by byte range. Everything that asks it is bounded in time."""

    remote = True

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = redact(url.partition("?")[0]).rstrip("/")
        check_no_keys(url)
        self.patience = patience
        opened = self._ask("connect", lambda: open_filesystem(url, patience.timeout))
        self.filesystem, self.base = opened
        self._open: OrderedDict[str, Any] = OrderedDict()

    def _ask(self, what: str, operation: Callable[[], Any]) -> Any:
        return self.patience.ask(f"{self.url}: {what}", operation)

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def manifest(self) -> Manifest:
        name = self.name(MANIFEST_NAME)

        def fetch() -> bytes:
            with self.filesystem.open_input_file(f"{self.base}/{MANIFEST_NAME}") as file:
                content: bytes = file.read(MOST_MANIFEST_BYTES + 1)
            if len(content) > MOST_MANIFEST_BYTES:
                raise DataError(f"{name}: larger than {MOST_MANIFEST_BYTES} bytes; no manifest is")
            return content

        try:
            content = self._ask(f"read {MANIFEST_NAME}", fetch)
        except FileNotFoundError:
            raise missing_manifest(name) from None
        return parse_manifest(content, name)

    def sizes(self, files: list[str]) -> list[int | None]:
        """Return the sizes of files from listings: a thousand files a request, not one."""
        folder = pafs.FileSelector(self.base, recursive=True)
        listing = self._ask("list", lambda: self.filesystem.get_file_info(folder))
        found = {info.path.strip("/"): info.size for info in listing if info.is_file}
        return [found.get(f"{self.base}/{file}".strip("/")) for file in files]

    def read(self, file: str, offset: int, size: int) -> bytes:
        def fetch() -> bytes:
            # taken out while in use: a thread that hangs in it must not share it with the next
            source = self._open.pop(file, None)
            if source is None:
                source = self.filesystem.open_input_file(f"{self.base}/{file}")
            content: bytes = source.read_at(size, offset)
            self._open[file] = source
            return content

        content: bytes = self._ask(f"read {file}", fetch)
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return content


def manifest_of(path: str, config: LoaderConfig) -> Manifest:
    """The manifest of a local or remote shard directory."""
    return open_storage(path, patience_of(config)).manifest()
