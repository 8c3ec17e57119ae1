"""Filters of `[filters]` that leave out documents, by measures that hold for any language."""

import re
import zlib
from collections.abc import Iterable, Iterator

from headrace.dataprep.text.row_format import Encoded, without_samples
from headrace.schemas.prepare.filter_config import FiltersConfig

NOT_LETTERS = re.compile(r"[\W\d_]+")


def apply_filters(filters: FiltersConfig, documents: Iterable[Encoded]) -> list[Encoded]:
    """The same documents; those that a filter leaves out have lost their samples."""
    if not filters.model_dump(exclude_none=True):
        return list(documents)
    return [filter_document(filters, document) for document in documents]


def filter_document(filters: FiltersConfig, document: Encoded) -> Encoded:
    """A document, dropped if one of the filters says so."""
    failed = next(failed_filters(filters, document), None) if document.samples else None
    return without_samples(document, f"filter {failed}") if failed else document


def failed_filters(filters: FiltersConfig, document: Encoded) -> Iterator[str]:
    """The keys of the filters that a document fails. Those about text pass pretokenized rows."""
    tokens = sum(sample.tokens for sample in document.samples)
    if outside(tokens, filters.min_tokens, None):
        yield "min_tokens"
    if outside(tokens, None, filters.max_tokens):
        yield "max_tokens"
    text = document.content
    if not isinstance(text, str):
        return
    if outside(len(text), filters.min_characters, None):
        yield "min_characters"
    if outside(len(text), None, filters.max_characters):
        yield "max_characters"
    if filters.min_alphabetic_share and alphabetic_share(text) < filters.min_alphabetic_share:
        yield "min_alphabetic_share"
    limit = filters.max_repeated_line_share
    if limit is not None and repeated_line_share(text) > limit:
        yield "max_repeated_line_share"
    limit = filters.max_compressible_share
    if limit is not None and compressible_share(text) > limit:
        yield "max_compressible_share"


def outside(value: int, low: int | None, high: int | None) -> bool:
    """Return whether a value is below one limit or above the other."""
    return (low is not None and value < low) or (high is not None and value > high)


def alphabetic_share(text: str) -> float:
    """Letters among the characters that are not white space; 0 where there are none."""
    seen = sum(map(len, text.split()))
    return len(NOT_LETTERS.sub("", text)) / seen if seen else 0.0


def repeated_line_share(text: str) -> float:
    """Characters in lines that equal an earlier one, among the characters of all lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def compressible_share(text: str) -> float:
    """Return the share of the text's bytes that zlib's level 1 saves."""
    data = text.encode()
    return 1 - len(zlib.compress(data, 1)) / len(data) if data else 0.0
