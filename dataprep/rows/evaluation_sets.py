"""The files of evaluation sets, read for the runs of words that documents must not share."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from headrace.dataprep.input.files import find_source_files
from headrace.dataprep.input.pieces import InputFile
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.records import Record, Reject, find_field
from headrace.dataprep.input.streams import without_query
from headrace.dataprep.input.tasks import cut_file
from headrace.dataprep.rows.contamination import EvaluationSets, Hashes, runs_of, strings
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.filter_config import DecontaminateConfig
from headrace.schemas.prepare.source_config import SourceConfig

NAME = "decontaminate"  # stands for a source in messages
TEXT_SUFFIXES = (".txt", ".md")  # each file is a text; others hold records
LARGEST_RECORD = 1 << 26


def open_sets(config: DecontaminateConfig | None) -> EvaluationSets | None:
    """Return the runs of the files of a config, if any; read once in each process.

    Raises:
        DataError: a file cannot be read, or is not what it was when the run began.
    """
    return None if config is None else _open(config.model_dump_json())


@functools.lru_cache(maxsize=1)
def _open(settings: str) -> EvaluationSets:
    config = DecontaminateConfig.model_validate_json(settings)
    sets = read_sets(config)
    if config.sha256 not in (None, sets.sha256()):
        raise DataError(
            f"decontaminate: {', '.join(sets.names)}: other texts than sha256 = "
            f'"{config.sha256}" stands for; restore the files, or remove the key'
        )
    return sets


def read_sets(config: DecontaminateConfig) -> EvaluationSets:
    """Read the texts of all files."""
    names: list[str] = []
    runs: list[Hashes] = []
    short = 0
    for path in config.paths:
        source = SourceConfig(name=NAME, type=type_of(path), path=path)
        for file in find_source_files(source):
            texts = [runs_of(text, config.words) for text in file_texts(source, file, config)]
            short += sum(1 for hashes in texts if not len(hashes))
            names.append(PurePosixPath(without_query(file.path)).name)
            runs.append(np.concatenate([*texts, np.zeros(0, np.uint64)]))
    owners = np.repeat(np.arange(len(runs), dtype=np.int32), [len(part) for part in runs])
    hashes, first = np.unique(np.concatenate(runs), return_index=True)
    if not len(hashes):
        raise DataError(
            f"decontaminate: no text of {', '.join(names)} has {config.words} words; lower words, "
            "or correct paths and fields"
        )
    return EvaluationSets(config.words, hashes, owners[first], names, short)


def type_of(path: str) -> Literal["text", "chat"]:
    """Return the type of source that reads a file."""
    return "text" if without_query(path).lower().endswith(TEXT_SUFFIXES) else "chat"


def file_texts(source: SourceConfig, file: InputFile, config: DecontaminateConfig) -> Iterator[str]:
    """The texts of a file: of the fields that the config names, or all."""
    for piece in cut_file(source, file, None, LARGEST_RECORD):
        for record in read_records(source, piece, None, LARGEST_RECORD):
            if isinstance(record, Reject):
                where = f"{record.file}:{record.line}"
                raise DataError(f"{where}: {record.reason}: {record.detail}; repair the file")
            yield from strings(chosen_fields(record, config.fields))


def chosen_fields(record: Record, names: Sequence[str]) -> list[object]:
    """The values of some fields of a record, those that it has; of all without names."""
    found: list[object] = []
    for name in names:
        with contextlib.suppress(LookupError):
            found.append(find_field(record.fields, name))
    return found if names else [record.fields]
