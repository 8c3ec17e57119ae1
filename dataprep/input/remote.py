"""Inputs behind URLs: listed, described, and read by byte range.

`http://` and `https://` are the standard library's, all others those of `schemas/file_systems.py`.
"""

import email.utils
import fnmatch
import functools
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from headrace.schemas.errors import DataError, HeadraceError, redact
from headrace.schemas.file_systems import open_filesystem
from headrace.schemas.retries import Patience
from headrace.schemas.seekable_file import SeekableFile

ResultT = TypeVar("ResultT")
ANSWER_SECONDS = 60
ATTEMPTS = 4
HTTP = Patience(ATTEMPTS, ANSWER_SECONDS, first_pause=0.25)
HTTP_BUFFER = 1 << 20
MOST_DIGITS = 18  # of a file's size
HF_EXPORT = "hf://datasets/{name}@refs/convert/parquet/{config}/{split}/*.parquet"


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, or the name of a data set on Hugging Face's hub."""
    return "://" in path or path.startswith("hf:")


def list_remote(source: str, pattern: str, answer_seconds: float = ANSWER_SECONDS) -> list[str]:
    """The files that a URL or a glob of one names.

    Args:
        answer_seconds: a storage may take for each of its answers.

    Raises:
        DataError: there is none, or nothing answers.
    """
    url, query = split_query(expand_name(pattern))
    marks = [url.index(mark) for mark in "*?[" if mark in url]
    if not marks:
        return [url + query]
    if is_http(url):
        raise DataError(f'source "{source}": {url}: HTTP lists no files; name each file')
    base, _, _ = url[: min(marks)].rpartition("/")
    filesystem, inner = filesystem_of(base + query, answer_seconds)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    entries = ask(url, lambda: filesystem.get_file_info(selector))
    names = [entry.path[len(inner) :].lstrip("/") for entry in entries if entry.is_file]
    return [f"{base}/{name}{query}" for name in names if fits(name, url[len(base) + 1 :])]


def split_query(pattern: str) -> tuple[str, str]:
    """A URL, and its options from the `?` on; a `?` without `=` after it belongs to a glob."""
    url, mark, query = pattern.rpartition("?")
    return (url, mark + query) if "=" in query and mark else (pattern, "")


def fits(path: str, pattern: str) -> bool:
    """Return whether a path matches a glob in which `**` crosses folders and `*` does not."""
    parts, wanted = path.split("/"), pattern.split("/")

    @functools.cache
    def match(part: int, want: int) -> bool:
        if want == len(wanted):
            return part == len(parts)
        if wanted[want] == "**":
            return match(part, want + 1) or (part < len(parts) and match(part + 1, want))
        return (
            part < len(parts)
            and fnmatch.fnmatchcase(parts[part], wanted[want])
            and match(part + 1, want + 1)
        )

    return match(0, 0)


def describe_remote(path: str) -> tuple[int, int]:
    """Size in bytes, and time of the last change in nanoseconds (0 where it is not told)."""
    if is_http(path):
        return http_size(path)
    filesystem, inner = filesystem_of(path)
    entry = ask(path, lambda: filesystem.get_file_info(inner))
    if not entry.is_file:
        raise DataError(f"{path}: not found; correct the path")
    return entry.size, entry.mtime_ns or 0


def open_remote(path: str) -> pa.NativeFile:
    """A file readable from any byte."""
    if is_http(path):
        return pa.PythonFile(io.BufferedReader(HttpFile(path), HTTP_BUFFER), mode="r")
    filesystem, inner = filesystem_of(path)
    return ask(path, lambda: filesystem.open_input_file(inner))


def expand_name(pattern: str) -> str:
    """`hf:NAME:CONFIG:SPLIT` as the glob of the hub's Parquet export of that data set."""
    if not pattern.startswith("hf:") or "://" in pattern:
        return pattern
    name, config, split, *_ = [*pattern.split(":")[1:], "", ""]
    return HF_EXPORT.format(name=name, config=config or "default", split=split or "train")


@functools.lru_cache(maxsize=16)
def filesystem_of(path: str, answer_seconds: float = ANSWER_SECONDS) -> tuple[pafs.FileSystem, str]:
    """Return the file system that reads a URL, and the file's path in it."""
    return ask(path, lambda: open_filesystem(path, answer_seconds, ATTEMPTS))


def ask(path: str, question: Callable[[], ResultT]) -> ResultT:
    """An answer of a storage, whose problems end in one line."""
    try:
        return question()
    except HeadraceError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: not found; correct the path") from None
    except Exception as error:  # noqa: BLE001  each storage raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{path}: cannot be reached ({reason}); check name, access and network, or download "
            "the files and name them"
        ) from None


def is_http(path: str) -> bool:
    """Return whether a URL is an HTTP one."""
    return path.startswith(("http://", "https://"))


def http_size(url: str) -> tuple[int, int]:
    """Size and time of the last change of a file on a web server."""
    with ask(url, lambda: request_range(url, 0, 0)) as reply:
        size = reply.headers.get("Content-Range", "").rpartition("/")[2]
        changed = modified(reply.headers.get("Last-Modified"))
    if not size.isdecimal() or len(size) > MOST_DIGITS:
        raise DataError(f"{url}: the server gives no byte ranges; download the file and name it")
    return int(size), changed


def modified(date: str | None) -> int:
    """Return a `Last-Modified` header in nanoseconds; 0 where it is missing or no date."""
    try:
        return int(email.utils.parsedate_to_datetime(date or "").timestamp()) * 10**9
    except (ValueError, OverflowError):
        return 0


def request_range(url: str, first: int, last: int) -> Any:
    """The reply to a request for bytes first to last; tried again where the server fails."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{last}"})

    def send() -> Any:
        try:
            return urllib.request.urlopen(request, timeout=HTTP.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise FileNotFoundError(url) from None
            raise

    return HTTP.repeat(redact(url), send)


class HttpFile(SeekableFile):
    """A file on a web server, read by ranges."""

    def __init__(self, url: str) -> None:
        super().__init__(http_size(url)[0])
        self.url = url

    def readinto(self, buffer: Any) -> int:
        last = min(self.position + len(buffer), self.size) - 1
        if last < self.position:
            return 0
        with request_range(self.url, self.position, last) as reply:
            data = reply.read(last - self.position + 2)  # one more shows that too much came
        if len(data) != last - self.position + 1:
            raise OSError(f"{len(data)} bytes of {last - self.position + 1} came")
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
