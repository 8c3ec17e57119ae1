"""A source's options with what they name on disk read into them: template files, slices of rows."""

import re
from itertools import pairwise

from headrace.dataprep.axolotl.templates import read_jinja
from headrace.dataprep.input.files import find_source_files
from headrace.dataprep.input.pieces import InputFile
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.records import Record
from headrace.dataprep.input.streams import line_of
from headrace.dataprep.input.tasks import cut_file
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig
from headrace.schemas.prepare.source_config import SourceConfig

UNLIMITED = 1 << 62  # bytes
SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


def resolve_options(source: SourceConfig) -> SourceConfig:
    """The source with the text of its template, and with the rows of each file that it takes.

    Raises:
        ConfigError: `rows` is no slice.
        DataError: a file cannot be read.
    """
    options = source.axolotl
    assert options is not None
    changes: dict[str, object] = {}
    if options.chat_template_jinja is not None:
        changes["chat_template_jinja"] = read_jinja(options.chat_template_jinja)
    if options.rows is not None and options.row_ranges is None:
        changes["row_ranges"] = row_ranges(source, options)
    return source.model_copy(update={"axolotl": options.model_copy(update=changes)})


def row_ranges(source: SourceConfig, options: AxolotlConfig) -> dict[str, list[int]]:
    """Return the records [start, end) that the slice takes from each file that has some."""
    match = SLICE.fullmatch(options.rows or "")
    if match is None:
        raise ConfigError(
            f'source "{source.name}": rows = "{options.rows}" is no slice; write it as [:100], '
            "[10%:20%] or [-5:]"
        )
    numbers = {file.path: record_numbers(source, file) for file in find_source_files(source)}
    total = sum(map(len, numbers.values()))
    start, end = place(match[1], total, 0), place(match[2], total, total)
    ends = [0]
    for found in numbers.values():
        ends.append(ends[-1] + len(found))
    ranges: dict[str, list[int]] = {}
    for (path, found), (before, after) in zip(numbers.items(), pairwise(ends), strict=True):
        taken = found[max(start - before, 0) : max(min(end, after) - before, 0)]
        if taken:
            ranges[path] = [taken[0] - 1, taken[-1]]
    return ranges


def record_numbers(source: SourceConfig, file: InputFile) -> list[int]:
    """The number of each record of a file, as rejects would show it: lines for JSONL."""
    return [
        line_of(item.place) if isinstance(item, Record) else item.line
        for piece in cut_file(source, file, None, UNLIMITED)
        for item in read_records(source, piece, None, UNLIMITED)
    ]


def place(text: str | None, total: int, default: int) -> int:
    """A row of a slice, from 0: a number, one from the end, or a share."""
    if text is None:
        return default
    number = round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)
