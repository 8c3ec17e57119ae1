"""Choices made by a document's content alone, whatever stands before or after it."""

import functools
import hashlib

from headrace.dataprep.text.row_format import Encoded, without_samples
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig
from headrace.schemas.shards.shard_format import EVALUATION, TRAIN


def choose_split(config: PrepareConfig, content: str | bytes) -> str:
    """The split of a document: duplicates never lie in both."""
    if not config.evaluation_fraction:
        return TRAIN
    share = place(config.seed, "evaluation", content)
    return EVALUATION if share < config.evaluation_fraction else TRAIN


def take_sample(
    config: PrepareConfig, source: SourceConfig, documents: list[Encoded]
) -> list[Encoded]:
    """The same documents; those outside of `sample_fraction` have lost their samples."""
    fraction = source.sample_fraction
    if fraction == 1:
        return documents
    return [
        without_samples(document, "left out by sample_fraction")
        if document.samples and place(config.seed, "sample", document.content) >= fraction
        else document
        for document in documents
    ]


def place(seed: int, purpose: str, content: str | bytes) -> float:
    """Map a content to [0, 1), uniformly over contents, and independently for each purpose."""
    content = content.encode() if isinstance(content, str) else content
    found = keyed_hash(seed, purpose).copy()
    found.update(content)
    return int.from_bytes(found.digest(), "little") / 2**64


@functools.cache
def keyed_hash(seed: int, purpose: str) -> hashlib.blake2b:
    """Return the hash of a purpose, with another key for each seed, to be copied."""
    key = derive_seed(seed, purpose).to_bytes(8, "little")
    return hashlib.blake2b(digest_size=8, key=key)
