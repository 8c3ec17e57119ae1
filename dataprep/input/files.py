"""The input files of each source: globs resolved, in a fixed order, each file identified."""

import fnmatch
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from headrace.dataprep.input.pieces import InputFile
from headrace.dataprep.input.remote import describe_remote, is_remote, list_remote
from headrace.dataprep.input.streams import without_query
from headrace.dataprep.input.walk import expand_glob
from headrace.schemas.addresses import recorded
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare.source_config import SourceConfig

MOST_FILES = 1 << 20  # that one pattern may match


def find_inputs(sources: Sequence[SourceConfig]) -> list[list[InputFile]]:
    """The files of each source, in config order.

    Raises:
        DataError: a path matches nothing, is a directory, or cannot be read; names the source.
    """
    return [find_source_files(source) for source in sources]


def find_source_files(source: SourceConfig, most: int = MOST_FILES) -> list[InputFile]:
    """The files of one source, sorted by path, each once; at most so many of one pattern."""
    patterns = [source.path] if isinstance(source.path, str) else source.path
    found = {path for pattern in patterns for path in match(source.name, pattern, most)}
    kept = [path for path in found if not is_excluded(path, source.exclude)]
    paths = sorted(kept, key=lambda path: (without_query(path), path))
    if not paths:
        raise DataError(f'source "{source.name}": exclude leaves none of {len(found)} files')
    return [describe_file(source.name, path) for path in paths]


def is_excluded(path: str, patterns: list[str]) -> bool:
    """Return whether a path matches one of the patterns, in which `*` also crosses folders."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def match(source: str, pattern: str, most: int) -> list[str]:
    """The files that one path or glob names, at most so many."""
    if is_remote(pattern):
        remote = list_remote(source, pattern)
        if not remote:
            raise DataError(
                f'source "{source}": no file matches {pattern}, or nothing answers there; check '
                "name and network, or download the files and name them"
            )
        return remote
    folder = Path(pattern)
    if (folder / "state.json").is_file():  # as `datasets` saves a set
        return [os.path.normpath(path) for path in folder.glob("*.arrow")]
    if (folder / "dataset_dict.json").is_file():
        raise DataError(
            f'source "{source}": {pattern} holds several splits; name one, for example '
            f'"{pattern.rstrip("/")}/train"'
        )
    if folder.is_dir():
        raise DataError(
            f'source "{source}": {pattern} is a directory; '
            f'name files, for example "{pattern.rstrip("/")}/*.txt"'
        )
    if Path(pattern).exists():
        return [os.path.normpath(pattern)]
    paths: set[str] = set()
    for path in expand_glob(source, pattern):
        paths.add(os.path.normpath(path))
        if len(paths) > most:
            raise DataError(
                f'source "{source}": {pattern} matches more than {most:,} files; narrow it'
            )
    if not paths:
        raise DataError(f'source "{source}": no file matches {pattern}; correct the path')
    return list(paths)


def describe_file(source: str, path: str) -> InputFile:
    """Size and modification time of a readable file."""
    if is_remote(path):
        return InputFile(path, *describe_remote(path))
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(f'source "{source}": {path} cannot be read ({error.strerror})') from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f'source "{source}": {path} is no regular file; name files')
    if not path.isprintable():
        raise DataError(
            f'source "{source}": the file name {path!a} is no printable UTF-8; rename it'
        )
    if not os.access(path, os.R_OK):
        raise DataError(f'source "{source}": {path} cannot be read (permission denied)')
    return InputFile(path, status.st_size, status.st_mtime_ns)


def inputs_fingerprint(sources: Sequence[SourceConfig], inputs: list[list[InputFile]]) -> str:
    """SHA-256 over source, path and size in bytes of every input file."""
    return fingerprint(
        [
            [source.name, recorded(file.path), file.size]
            for source, files in zip(sources, inputs, strict=True)
            for file in files
        ]
    )
