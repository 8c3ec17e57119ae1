"""How the inputs are cut: a task is what one worker gets and one marker covers."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.inputs import InputFile
from headrace.dataprep.streams import compression, open_bytes, read_chunk
from headrace.schemas.errors import DataError
from headrace.schemas.prepare_config import PrepareConfig, SourceConfig

FileFormat = Literal["text", "lines", "json", "parquet"]
TASKS_WANTED = 256  # tasks grow with the corpus once there are this many
MOST_BLOCKS_IN_TASK = 64


@dataclass(frozen=True)
class Piece:
    """A part of one file: bytes [start, end), or row groups of Parquet; None is the end."""

    file: InputFile
    format: FileFormat
    start: int
    end: int | None
    size: int


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
            "source": self.source.model_dump(mode="json"),
            "pieces": [asdict(piece) for piece in self.pieces],
        }


def plan_tasks(config: PrepareConfig, inputs: list[list[InputFile]]) -> list[Task]:
    """Cut all inputs into tasks of `block_bytes`, or up to 64 times that in a large corpus."""
    total = sum(file.size for files in inputs for file in files)
    blocks = min(max(1, total // TASKS_WANTED // config.block_bytes), MOST_BLOCKS_IN_TASK)
    target = blocks * config.block_bytes
    tasks: list[Task] = []
    for source, files in zip(config.sources, inputs, strict=True):
        pieces = (piece for file in files for piece in cut_file(source, file, target))
        for number, group in enumerate(group_pieces(pieces, target)):
            tasks.append(Task(len(tasks), number, source, tuple(group)))
    return tasks


def group_pieces(pieces: Iterable[Piece], target: int) -> Iterator[list[Piece]]:
    """Consecutive pieces together within `target` bytes: small files share a task."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > target:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group


def cut_file(source: SourceConfig, file: InputFile, target: int) -> Iterator[Piece]:
    """The pieces of one file: equal byte ranges where records can be found from any byte."""
    kind = file_format(source, file)
    if kind == "parquet":
        yield from cut_parquet(source, file, target)
        return
    whole = kind == "json" or (kind == "text" and source.document_separator is None)
    count = 1 if whole or compression(file.path) else max(1, -(-file.size // target))
    for index in range(count):
        start, end = file.size * index // count, file.size * (index + 1) // count
        yield Piece(file, kind, start, end if index + 1 < count else None, end - start)


def file_format(source: SourceConfig, file: InputFile) -> FileFormat:
    """What is in a file, by the source's type, its name and, for `.json`, its first character."""
    if source.type == "text":
        return "text"
    path = Path(file.path)
    suffix = Path(path.stem).suffix if compression(file.path) else path.suffix
    if suffix.lower() in (".parquet", ".pq"):
        return "parquet"
    return "json" if suffix.lower() == ".json" and begins_with_list(file.path) else "lines"


def begins_with_list(path: str) -> bool:
    """Whether the first character that is not white space opens a JSON list."""
    with open_bytes(path) as stream:
        while chunk := read_chunk(stream, path, 4096):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text.startswith(b"[")
    return False


def cut_parquet(source: SourceConfig, file: InputFile, target: int) -> Iterator[Piece]:
    """Consecutive row groups of about `target` bytes of text."""
    sizes = text_sizes(source, file.path)
    start = 0
    for end in range(1, len(sizes) + 1):
        size = sum(sizes[start:end])
        if end == len(sizes) or size + sizes[end] > target:
            yield Piece(file, "parquet", start, end, size)
            start = end


def text_sizes(source: SourceConfig, path: str) -> list[int]:
    """Uncompressed bytes of the text column in each row group."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path}: not readable as Parquet ({reason}); replace the file") from None
    with file:
        if source.text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(
                f'{path}: no column "{source.text_field}"; set text_field to one of: {names}'
            )
        if not is_text(file.schema_arrow.field(source.text_field).type):
            kind = file.schema_arrow.field(source.text_field).type
            raise DataError(
                f'{path}: column "{source.text_field}" is {kind}, not string; '
                "set text_field to a column of strings"
            )
        metadata = file.metadata
        paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        column = paths.index(source.text_field)
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any of Arrow's layouts."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
