"""Documents that share runs of words with evaluation sets, left out."""

import contextlib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.dataprep.input.files import find_source_files
from headrace.dataprep.input.pieces import InputFile
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.records import Record, Reject, find_field
from headrace.dataprep.input.streams import without_query
from headrace.dataprep.input.tasks import cut_file
from headrace.dataprep.text.row_format import Encoded, without_samples
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.filter_config import DecontaminateConfig
from headrace.schemas.prepare.source_config import SourceConfig

NAME = "decontaminate"  # stands for a source in messages
TEXT_SUFFIXES = (".txt", ".md")  # each file is a text; others hold records
LARGEST_RECORD = 1 << 26
# ideographs and kana are words of their own: such texts have no spaces
SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{SPACELESS}]|[^\\W{SPACELESS}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
KNOWN_WORDS = 1 << 18

Hashes = NDArray[np.uint64]


class EvaluationSets(NamedTuple):
    """Runs of words of some files: sorted hashes, the file of each, the files' names, and how many
    of their texts are too short to have any."""

    hashes: Hashes
    owners: NDArray[np.int32]
    names: list[str]
    short: int

    def sha256(self) -> str:
        """Return what tells these runs from others."""
        return hashlib.sha256(self.hashes.tobytes() + self.owners.tobytes()).hexdigest()

    def owner(self, hashes: Hashes) -> str | None:
        """Return the file with the first of some runs, or None."""
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        found = np.flatnonzero(self.hashes[places] == hashes) if len(self.hashes) else places[:0]
        return self.names[self.owners[places[found[0]]]] if len(found) else None


def decontaminate(
    config: DecontaminateConfig | None, documents: Iterable[Encoded]
) -> list[Encoded]:
    """The same documents; those that share a run of words with a set have lost their samples."""
    if config is None:
        return list(documents)
    sets = open_sets(config.model_dump_json())
    return [decontaminated(config, sets, document) for document in documents]


def decontaminated(config: DecontaminateConfig, sets: EvaluationSets, document: Encoded) -> Encoded:
    """A document, dropped if it shares a run of words."""
    if not document.samples or not isinstance(document.content, str):
        return document
    for text in texts_of(document.content):
        if name := sets.owner(runs_of(text, config.words)):
            return without_samples(document, f"shares {config.words} words with {name}")
    return document


@functools.lru_cache(maxsize=1)
def open_sets(settings: str) -> EvaluationSets:
    """The runs of the files of a config, given as JSON; read once in each process.

    Raises:
        DataError: a file cannot be read, or is not what it was when the run began.
    """
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
    return EvaluationSets(hashes, owners[first], names, short)


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


def texts_of(content: str) -> Iterator[str]:
    """A document's text, and the texts in it where it is JSON, as that of a conversation is."""
    if content[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from strings(json.loads(content))
    yield content


def strings(value: object) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def runs_of(text: str, words: int) -> Hashes:
    """A hash of each run of so many words of a text, without case, marks and white space."""
    found = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(found) < words:
        return np.zeros(0, np.uint64)
    values = np.fromiter(map(word_hash, found), np.uint64, len(found))
    hashes = np.zeros(len(values) - words + 1, np.uint64)
    for offset in range(words):
        hashes *= MULTIPLIER
        hashes += values[offset : offset + len(hashes)]
        hashes ^= hashes >> np.uint64(29)
    return hashes


@functools.lru_cache(maxsize=KNOWN_WORDS)
def word_hash(word: str) -> int:
    """A 64-bit hash of a word."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
