"""The paths that a glob names, found within a limit of what is looked at on the way."""

import fnmatch
import os
import re
from collections.abc import Iterator

from headrace.schemas.errors import DataError

MOST_WALKED = 1 << 22  # entries of folders: some seconds
MAGIC = re.compile(r"[*?[]")
ANY_DEPTH = "**"


def expand_glob(source: str, pattern: str, most: int = MOST_WALKED) -> Iterator[str]:
    """Yield the files that a pattern names as `glob` does, some perhaps twice, in any order.

    `**` crosses folders, links to them included; names that begin with a dot are found only by a
    part that begins with one.

    Args:
        most: entries of folders that are looked at.

    Raises:
        DataError: it looks at too many entries; names the source.
    """
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    if parts and not pattern.endswith("/"):  # which names folders
        yield from Walk(source, pattern, most).expand(root, parts)


class Walk:
    """A walk over folders, which counts what it sees."""

    def __init__(self, source: str, pattern: str, most: int) -> None:
        self.source = source
        self.pattern = pattern
        self.most = most
        self.seen = 0

    def expand(self, base: str, parts: list[str]) -> Iterator[str]:
        """Yield the files below a folder that the parts of a pattern name."""
        head, rest = parts[0], parts[1:]
        if head == ANY_DEPTH:
            for folder in self.below(base):
                yield from self.expand(folder, rest) if rest else self.files(folder, "*")
        elif not MAGIC.search(head):
            path = os.path.join(base, head)  # noqa: PTH118  `..` stays
            if rest:
                yield from self.expand(path, rest)
            elif os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112
                yield path
        elif rest:
            for entry in self.entries(base, head):
                if entry.is_dir():
                    yield from self.expand(entry.path, rest)
        else:
            yield from self.files(base, head)

    def files(self, base: str, pattern: str) -> Iterator[str]:
        """Yield what is no folder."""
        return (entry.path for entry in self.entries(base, pattern) if not entry.is_dir())

    def below(self, base: str) -> Iterator[str]:
        """Yield a folder and all below it."""
        yield base
        for entry in self.entries(base, "*"):
            if entry.is_dir():
                yield from self.below(entry.path)

    def entries(self, base: str, pattern: str) -> Iterator["os.DirEntry[str]"]:
        """Yield the entries of a folder that fit; of one that cannot be read, none."""
        try:
            with os.scandir(base or ".") as found:
                listed = list(self.counted(found))
        except OSError:
            return
        hidden = pattern.startswith(".")
        for entry in listed:
            seen = hidden or not entry.name.startswith(".")
            if seen and fnmatch.fnmatchcase(entry.name, pattern):
                yield entry

    def counted(self, found: Iterator["os.DirEntry[str]"]) -> Iterator["os.DirEntry[str]"]:
        """Yield entries while there are not too many."""
        for entry in found:
            self.seen += 1
            if self.seen > self.most:
                raise DataError(
                    f'source "{self.source}": {self.pattern} looks at more than '
                    f"{self.most:,} files and folders; narrow it"
                )
            yield entry
