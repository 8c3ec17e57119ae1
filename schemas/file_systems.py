"""File systems behind URLs, opened alike by both halves.

`s3://` and `gs://` are pyarrow's own; what else fsspec opens (`hf://`, `abfs://`, ...) needs its
package.
"""

import os
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from headrace.schemas.errors import ConfigError

CONNECT_SECONDS = 10
S3_OPTIONS = {"region", "endpoint_override", "scheme", "anonymous"}
GOOGLE_OPTIONS = {"anonymous", "endpoint_override", "scheme"}
FSSPEC_PACKAGES = {
    "hf": ["huggingface_hub"],
    "abfs": ["adlfs"],
    "az": ["adlfs"],
    "http": ["aiohttp"],
    "https": ["aiohttp"],
}


def open_filesystem(url: str, timeout: float, attempts: int = 1) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URL, and the path in it.

    S3 takes credentials, region and endpoint from AWS's environment variables and files; `region`,
    `endpoint_override`, `scheme` and `anonymous` also from the URL's query.

    Args:
        timeout: seconds after which Google's client makes a request that fails no more.
        attempts: of S3's client at one request; 1 for those who try again themselves.

    Raises:
        ConfigError: the URL is no address of a storage, has an unknown option, or needs a package.
    """
    try:
        scheme = urlsplit(url).scheme
        if scheme == "s3":
            return open_s3(url, attempts)
        if scheme in {"gs", "gcs"}:
            return open_google(url, timeout)
        if scheme == "file":
            return pafs.LocalFileSystem(), unquote(urlsplit(url).path).rstrip("/")
        return open_fsspec(url, scheme)
    except (ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{url}: not an address of this storage ({error}); correct it") from None


def options_of(url: str, known: set[str]) -> dict[str, Any]:
    """Return the options in a URL's query."""
    options: dict[str, Any] = dict(parse_qsl(urlsplit(url).query))
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"{url}: unknown option {unknown[0]}; known: {', '.join(sorted(known)) or 'none'}"
        )
    if "anonymous" in options:
        options["anonymous"] = options["anonymous"] == "true"
    return options


def open_s3(url: str, attempts: int) -> tuple[pafs.FileSystem, str]:
    """Open S3, or what speaks its protocol."""
    options = options_of(url, S3_OPTIONS)
    parts = urlsplit(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    region = options.get("region") or os.environ.get("AWS_REGION")
    region = region or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        own = "endpoint_override" in options
        region = "us-east-1" if own else pafs.resolve_s3_region(parts.netloc)
    filesystem = pafs.S3FileSystem(
        **options | {"region": region},
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
    return filesystem, unquote(f"{parts.netloc}{parts.path}").rstrip("/")


def open_google(url: str, seconds: float) -> tuple[pafs.FileSystem, str]:
    """Open Google Cloud Storage.

    Credentials are the application's default ones, or none: `?anonymous=true`, also written
    `gs://anonymous@bucket`. `endpoint_override` and `scheme` name another server.

    Args:
        seconds: after which a request that fails is not made again. Arrow's own limit is 15
            minutes, also where only the credentials are missing.
    """
    parts, options = urlsplit(url), options_of(url, GOOGLE_OPTIONS)
    user, _, bucket = parts.netloc.rpartition("@")
    anonymous = options.pop("anonymous", False) or user == "anonymous"
    limit = timedelta(seconds=seconds)
    filesystem = pafs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **options)
    return filesystem, unquote(f"{bucket}{parts.path}").rstrip("/")


def open_fsspec(url: str, scheme: str) -> tuple[pafs.FileSystem, str]:
    """Open any other scheme, `hf` among them, through fsspec."""
    if options := parse_qsl(urlsplit(url).query):
        known = "s3:// and gs:// have options"
        raise ConfigError(f"{url}: unknown option {min(options)[0]}; only {known}; remove it")
    packages = " ".join(["fsspec", *FSSPEC_PACKAGES.get(scheme, [])])
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(url)
    except ImportError:
        raise ConfigError(f"{url}: {scheme}:// needs: pip install {packages}") from None
    except ValueError:
        raise ConfigError(f"{url}: no storage is known as {scheme}://; use s3, gs or hf") from None
    return pafs.PyFileSystem(CheckedHandler(filesystem)), path


class CheckedHandler(pafs.FSSpecHandler):
    """Handler of fsspec's file systems whose files raise only OSError."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file readable from any byte."""
        if not self.fs.isfile(path):
            raise FileNotFoundError(path)
        return pa.PythonFile(CheckedFile(self.fs.open(path, mode="rb")), mode="r")


class CheckedFile:
    """A file whose reads fail with OSError, as those of readers that expect one."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        try:
            return bytes(self.file.read(size))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  each storage raises its own
            raise OSError(f"{type(error).__name__}: {error}") from None

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        """The byte that is read next."""
        return int(self.file.tell())

    def close(self) -> None:
        """Let go of the connection."""
        self.closed = True
        self.file.close()
