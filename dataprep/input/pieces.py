"""Records of the input: a file, a part of one, and the task of one worker."""

from dataclasses import asdict, dataclass
from typing import Literal

from headrace.schemas.prepare.source_config import FileFormat, SourceConfig

PieceFormat = FileFormat | Literal["objects", "inside"]  # objects over lines, a list in an object
Columns = frozenset[str] | None  # fields of a record; None: all


@dataclass(frozen=True)
class InputFile:
    """One file as its glob matched it. Its size (bytes) and time tell whether it changed."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """A part of one file: bytes [start, end), or row groups or batches; None is the end.

    `first` counts the records before it where rejects are numbered by them.
    """

    file: InputFile
    format: PieceFormat
    start: int
    end: int | None
    size: int
    first: int = 0


@dataclass(frozen=True)
class Task:
    """Consecutive pieces of one source, numbered among all tasks and in the source."""

    number: int
    number_in_source: int
    source: SourceConfig
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Input bytes."""
        return sum(piece.size for piece in self.pieces)

    def identity(self) -> dict[str, object]:
        """Equal identities read equal records."""
        return {
            "number_in_source": self.number_in_source,
            "source": self.source.model_dump(mode="json", exclude={"max_rows", "max_tokens"}),
            "pieces": [asdict(piece) for piece in self.pieces],
        }
