"""What finished tasks counted, and how it becomes the manifest's sources and token ledger."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from headrace.schemas.manifest import SourceRecord

KeyT = TypeVar("KeyT", int, str)
QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)


class TaskStats(BaseModel):
    """Counts of one task, or of several added up.

    `documents` leaves out the refused ones, and holds the dropped ones.
    """

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    tokens_in: int = 0
    rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    trained_tokens: dict[str, int] = {}
    tokens_dropped: dict[str, int] = {}
    documents_dropped: dict[str, int] = {}
    rejects: dict[str, int] = {}
    document_lengths: dict[int, int] = {}

    @property
    def rejected(self) -> int:
        """Refused documents."""
        return sum(self.rejects.values())

    @property
    def kept(self) -> int:
        """Documents that are in rows, whole or in part."""
        return self.documents - sum(self.documents_dropped.values())


def add_stats(parts: Iterable[TaskStats]) -> TaskStats:
    """The sum of several counts."""
    parts = list(parts)
    return TaskStats(
        documents=sum(part.documents for part in parts),
        tokens_in=sum(part.tokens_in for part in parts),
        rows=add_counts(part.rows for part in parts),
        tokens=add_counts(part.tokens for part in parts),
        trained_tokens=add_counts(part.trained_tokens for part in parts),
        tokens_dropped=add_counts(part.tokens_dropped for part in parts),
        documents_dropped=add_counts(part.documents_dropped for part in parts),
        rejects=add_counts(part.rejects for part in parts),
        document_lengths=add_counts(part.document_lengths for part in parts),
    )


def add_counts(parts: Iterable[Mapping[KeyT, int]]) -> dict[KeyT, int]:
    """The sum of several counts by key, keys in the order in which they first come."""
    total: Counter[KeyT] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def source_record(name: str, stats: TaskStats) -> SourceRecord:
    """One source's line in the manifest."""
    return SourceRecord(
        name=name,
        documents=stats.documents,
        rejected_documents=stats.rejected,
        dropped_documents=stats.documents_dropped,
        rows=sum(stats.rows.values()),
        tokens=sum(stats.tokens.values()),
        trained_tokens=sum(stats.trained_tokens.values()),
        document_length_quantiles=quantiles(stats.document_lengths),
    )


def quantiles(counts: dict[int, int]) -> dict[str, int]:
    """Exact nearest-rank quantiles of values given with their counts."""
    total = sum(counts.values())
    ranks = {f"p{percent}": max(1, -(-total * percent // 100)) for percent in QUANTILES}
    result: dict[str, int] = {}
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        for name, rank in ranks.items():
            if rank <= seen:
                result.setdefault(name, value)
    return result
