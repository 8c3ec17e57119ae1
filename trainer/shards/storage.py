"""Shard directories wherever they lie: local paths, or URLs that pyarrow or fsspec open."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from headrace.schemas.addresses import check_address
from headrace.schemas.errors import ConfigError, DataError, redact
from headrace.schemas.google_storage import open_google
from headrace.schemas.named_files import open_regular
from headrace.schemas.retries import Patience
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import missing_manifest, parse_manifest, read_manifest
from headrace.schemas.shards.shard_format import MANIFEST_NAME
from headrace.schemas.train.data_config import LoaderConfig

CONNECT_SECONDS = 10
OPEN_FILES = 32
MOST_MANIFEST_BYTES = 1 << 30
S3_OPTIONS = {"region", "endpoint_override", "scheme", "anonymous"}
FSSPEC_PACKAGES = {
    "hf": ["huggingface_hub"],
    "abfs": ["adlfs"],
    "az": ["adlfs"],
    "http": ["aiohttp"],
    "https": ["aiohttp"],
}


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


def open_filesystem(url: str, timeout: float) -> tuple[Any, str]:
    """The file system and the path in it that a URL names.

    S3 takes credentials, region and endpoint from AWS's environment variables and files; `region`,
    `endpoint_override`, `scheme` and `anonymous` also from the URL's query.
    """
    try:
        check_address(url)
        return open_scheme(url, timeout)
    except (ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{url}: not an address of this storage ({error}); correct it") from None


def open_scheme(url: str, timeout: float) -> tuple[Any, str]:
    """The file system of a URL, by its scheme, and the path in it."""
    parts = urlsplit(url)
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    if "anonymous" in options:
        options["anonymous"] = options["anonymous"] == "true"
    path = unquote(f"{parts.netloc}{parts.path}").rstrip("/")
    if parts.scheme == "s3":
        return open_s3(url, parts.netloc, options), path
    if parts.scheme in {"gs", "gcs"}:
        return open_google(url, timeout)
    if parts.scheme == "file":
        return pafs.LocalFileSystem(), unquote(parts.path).rstrip("/")
    if options:
        known = "s3:// and gs:// have options"
        raise ConfigError(f"{url}: unknown option {min(options)}; only {known}; remove it")
    return open_fsspec(url, parts.scheme), path


def open_s3(url: str, bucket: str, options: dict[str, Any]) -> pafs.S3FileSystem:
    """S3, or what speaks its protocol. Retries are ours, so that they are bounded and seen."""
    unknown = sorted(options.keys() - S3_OPTIONS)
    if unknown:
        known = ", ".join(sorted(S3_OPTIONS))
        raise ConfigError(f"{url}: unknown option {unknown[0]}; known: {known}")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    region = options.get("region") or os.environ.get("AWS_REGION")
    region = region or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        own = "endpoint_override" in options
        region = "us-east-1" if own else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        **options | {"region": region},
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def open_fsspec(url: str, scheme: str) -> pafs.FileSystem:
    """Any other scheme, `hf` among them, through fsspec."""
    packages = " ".join(["fsspec", *FSSPEC_PACKAGES.get(scheme, [])])
    try:
        import fsspec

        filesystem = fsspec.filesystem(scheme)
    except ImportError:
        raise ConfigError(f"{url}: {scheme}:// needs: pip install {packages}") from None
    except ValueError:
        raise ConfigError(f"{url}: no storage is known as {scheme}://; use s3, gs or hf") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


def manifest_of(path: str, config: LoaderConfig) -> Manifest:
    """The manifest of a local or remote shard directory."""
    return open_storage(path, patience_of(config)).manifest()
