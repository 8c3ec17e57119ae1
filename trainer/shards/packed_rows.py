"""The rows in the places of a global batch, without their tokens."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple


class PackedRow(NamedTuple):
    """One row, or the part of it that is in the place."""

    source: str
    row_key: int
    tokens: int


def places_in_order(
    leaders: Sequence[Sequence[Sequence[Sequence[PackedRow]]]],
) -> list[Sequence[PackedRow]]:
    """The places of a global batch that hold rows, from the micro-batches at its leaders.

    Args:
        leaders: [replica][micro-batch][place]; micro-batch k is the k mod replicas-th leader's.
    """
    micro_batches = chain.from_iterable(zip(*leaders, strict=True))
    return [place for micro_batch in micro_batches for place in micro_batch if place]


def rows_digest(rows: Iterable[PackedRow]) -> str:
    """SHA-256 over the row keys of a global batch, in its order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.row_key.to_bytes(8, "little"))
    return digest.hexdigest()


def tokens_by_source(rows: Iterable[PackedRow]) -> dict[str, int]:
    """Tokens of each source, by name in ascending order."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.source] = counts.get(row.source, 0) + row.tokens
    return dict(sorted(counts.items()))


def fill(tokens: int, places: int, sequence_tokens: int) -> float:
    """Tokens over the capacity of the places that hold rows."""
    return tokens / (places * sequence_tokens)
