"""Cutting of the inputs into tasks: a task is the work of one worker, covered by one marker."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.input.arrow_batches import arrow_batches, find_type, is_text
from headrace.dataprep.input.arrow_messages import check_messages
from headrace.dataprep.input.csv_records import find_delimiter
from headrace.dataprep.input.csv_scan import scan_csv
from headrace.dataprep.input.json_scan import scan_json
from headrace.dataprep.input.json_shape import Shape, find_shape
from headrace.dataprep.input.pieces import Columns, InputFile, Piece, Task
from headrace.dataprep.input.streams import (
    BOM,
    compression,
    open_bytes,
    open_random,
    read_chunk,
    without_query,
)
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import DELIMITERS, FileFormat, SourceConfig
from headrace.schemas.shards.unpacked_sizes import LARGE, unpacked_problem

SUFFIXES: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
JSON = ("json", "objects", "inside")
SCANNED = (*DELIMITERS, *JSON)
HEADER_BYTES = 1 << 26
TASKS_WANTED = 256  # tasks grow with the corpus once there are this many
SMALLEST_TASK = 2 << 20  # bytes, unless blocks are smaller: a second or two of one core
SMALLEST_PICTURED_TASK = 1 << 16  # of rows with pictures, which are most of the work
MOST_BLOCKS_IN_TASK = 64


def plan_tasks(
    config: PrepareConfig, inputs: list[list[InputFile]], columns: list[Columns]
) -> list[Task]:
    """Cut all inputs into tasks of `block_bytes`, or up to 64 times that in a large corpus.

    In a small one they are smaller, so that no worker waits long for the last of them.

    Args:
        columns: for each source the fields that its format reads; None: all.
    """
    total = sum(file.size for files in inputs for file in files)
    blocks = min(total // TASKS_WANTED // config.block_bytes, MOST_BLOCKS_IN_TASK)
    least = SMALLEST_TASK if config.images is None else SMALLEST_PICTURED_TASK
    smallest = min(config.block_bytes, max(least, total // TASKS_WANTED))
    target = max(blocks * config.block_bytes, smallest)
    tasks: list[Task] = []
    for source, files, names in zip(config.sources, inputs, columns, strict=True):
        pieces = (piece for file in files for piece in cut_file(source, file, names, target))
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


def cut_file(
    source: SourceConfig, file: InputFile, columns: Columns, target: int
) -> Iterator[Piece]:
    """The pieces of one file: equal byte ranges where records can be found from any byte."""
    kind = file_format(source, file)
    if kind in ("parquet", "arrow"):
        yield from cut_table(source, file, kind, columns, target)
        return
    shape = find_shape(file.path, columns) if kind == "jsonl" else Shape(kind)
    if shape.format in SCANNED and not compression(file.path) and file.size > target:
        yield from cut_scanned(source, file, shape, target)
        return
    lines = shape.format == "jsonl" or (kind == "text" and source.separator is not None)
    if not lines or compression(file.path):
        yield Piece(file, shape.format, shape.start, None, file.size - shape.start)
        return
    count = max(1, -(-file.size // target))
    for index in range(count):
        start, end = file.size * index // count, file.size * (index + 1) // count
        yield Piece(file, kind, start, end if index + 1 < count else None, end - start)


def cut_scanned(
    source: SourceConfig, file: InputFile, shape: Shape, target: int
) -> Iterator[Piece]:
    """About equal pieces of a file whose records can only be told apart from its start."""
    count = -(-file.size // target)
    starts, numbers = [shape.start], [0]
    for number, start in enumerate(record_starts(source, file.path, shape)):
        if number and start >= file.size * len(starts) // count:
            starts.append(start)
            numbers.append(number)
    for start, end, first in zip(starts, [*starts[1:], None], numbers, strict=True):
        yield Piece(file, shape.format, start, end, (end or file.size) - start, first)


def record_starts(source: SourceConfig, path: str, shape: Shape) -> Iterator[int]:
    """The first byte of each record of a CSV or JSON file."""
    if shape.format in JSON:
        return (span.start for span in scan_json(path, shape.format, shape.start, 0))
    delimiter = find_delimiter(source, path, shape.format, HEADER_BYTES)
    return (span.start for span in scan_csv(path, delimiter, 0, 0))


def file_format(source: SourceConfig, file: InputFile) -> FileFormat:
    """Return the format of a file, by the source's type, its name and, for `.json`, its first
    character.
    """
    if source.type == "text":
        return "text"
    if source.format is not None:
        return source.format
    path = Path(without_query(file.path))
    suffix = Path(path.stem).suffix if compression(file.path) else path.suffix
    if suffix.lower() == ".json":
        return "json" if begins_with_list(file.path) else "jsonl"
    return SUFFIXES.get(suffix.lower(), "jsonl")


def begins_with_list(path: str) -> bool:
    """Return whether the first character that is not white space opens a JSON list."""
    with open_bytes(path) as stream:
        while chunk := read_chunk(stream, path, 4096):
            if text := chunk.removeprefix(BOM).lstrip():
                return text.startswith(b"[")
    return False


def cut_table(
    source: SourceConfig, file: InputFile, kind: FileFormat, columns: Columns, target: int
) -> Iterator[Piece]:
    """Consecutive row groups or batches of about `target` bytes in the columns that are read."""
    read = row_group_sizes if kind == "parquet" else batch_sizes
    sizes = read(source, file.path, columns)
    start = 0
    for end in range(1, len(sizes) + 1):
        size = sum(sizes[start:end])
        if end == len(sizes) or size + sizes[end] > target:
            yield Piece(file, kind, start, end, size)
            start = end


def row_group_sizes(
    source: SourceConfig, path: str, columns: Columns, large: int = LARGE
) -> list[int]:
    """Uncompressed bytes of the columns that are read, in each row group.

    Args:
        large: see `unpacked_sizes.is_bomb`.
    """
    try:
        file = pq.ParquetFile(open_random(path))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path}: not readable as Parquet ({reason}); replace the file") from None
    with file:
        check_columns(source, path, file.schema_arrow, columns)
        metadata = file.metadata
        paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        tops = [path.split(".")[0] for path in paths]
        read = [index for index, top in enumerate(tops) if columns is None or top in columns]
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        for number, group in enumerate(groups):
            if problem := unpacked_problem(group, columns, large):
                raise DataError(f"{path}: row group {number}: {problem}")
        return [sum(group.column(i).total_uncompressed_size for i in read) for group in groups]


def batch_sizes(source: SourceConfig, path: str, columns: Columns, large: int = LARGE) -> list[int]:
    """Bytes in memory of the columns that are read, in each batch of an Arrow file or stream.

    Args:
        large: see `unpacked_sizes.is_bomb`.
    """
    sizes: list[int] = []
    try:
        with open_random(path) as stream:
            check_messages(stream, large)
        for batch in arrow_batches(path):
            if not sizes:
                check_columns(source, path, batch.schema, columns)
            names = [n for n in batch.schema.names if columns is None or n in columns]
            sizes.append(batch.select(names).nbytes)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path}: not readable as Arrow ({reason}); replace the file") from None
    return sizes


def check_columns(source: SourceConfig, path: str, schema: pa.Schema, columns: Columns) -> None:
    """Refuse a file without any of the columns that are read, or with a text that is none."""
    names = ", ".join(schema.names)
    if source.type == "documents":
        kind = find_type(pa.struct(schema), source.text_field)
        if kind is None:
            raise DataError(
                f'{path}: no column "{source.text_field}"; set text_field to one of: {names}'
            )
        if not is_text(kind):
            raise DataError(
                f'{path}: column "{source.text_field}" is {kind}, not string; '
                "set text_field to a column of strings"
            )
    elif columns is not None and not columns & {*schema.names}:
        raise DataError(
            f"{path}: none of the columns {', '.join(sorted(columns))} is there, only: {names}; "
            f'set the fields of source "{source.name}", or its type'
        )
