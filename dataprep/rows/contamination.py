"""Documents that share runs of words with evaluation sets, left out."""

import contextlib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.dataprep.text.row_format import Encoded, without_samples

# ideographs and kana are words of their own: such texts have no spaces
SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{SPACELESS}]|[^\\W{SPACELESS}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
KNOWN_WORDS = 1 << 18

Hashes = NDArray[np.uint64]


class EvaluationSets(NamedTuple):
    """Runs of so many words of some files: sorted hashes, the file of each, the files' names, and
    how many of their texts are too short to have any."""

    words: int
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


def decontaminate(sets: EvaluationSets | None, documents: Iterable[Encoded]) -> list[Encoded]:
    """Return the same documents; those that share a run of words with a set have lost their
    samples."""
    if sets is None:
        return list(documents)
    return [decontaminated(sets, document) for document in documents]


def decontaminated(sets: EvaluationSets, document: Encoded) -> Encoded:
    """Return a document, dropped if it shares a run of words."""
    if not document.samples or not isinstance(document.content, str):
        return document
    for text in texts_of(document.content):
        if name := sets.owner(runs_of(text, sets.words)):
            return without_samples(document, f"shares {sets.words} words with {name}")
    return document


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
