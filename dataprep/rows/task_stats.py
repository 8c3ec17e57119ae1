"""Counts of finished tasks, and the manifest's sources and token ledger made of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from headrace.dataprep.rows.picture_rows import weight
from headrace.schemas.shards.manifest import SourceRecord

KeyT = TypeVar("KeyT", int, str)
QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)


class TaskStats(BaseModel):
    """Counts of one task, or of several added up.

    `documents` leaves out the refused ones, and holds the dropped ones. `mixed_tokens` are those of
    a mixture's documents by their source, before packing. `pictures_in` are those of all records,
    refused ones included.
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
    mixed_tokens: dict[str, int] = {}
    notes: dict[str, int] = {}
    pictures_in: int = 0
    pictures: dict[str, int] = {}
    picture_bytes: dict[str, int] = {}
    pictures_dropped: dict[str, int] = {}

    def weight(self, split: str) -> int:
        """Return what the rows of a split take in memory and files, in tokens."""
        return weight(self.tokens.get(split, 0), self.picture_bytes.get(split, 0))

    @property
    def rejected(self) -> int:
        """Refused documents."""
        return sum(self.rejects.values())

    @property
    def kept(self) -> int:
        """Documents that are in rows, whole or in part."""
        return self.documents - sum(self.documents_dropped.values())


class StatsSum:
    """A running sum of counts: adding takes time by the size of the part, not of the sum."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)

    def add(self, part: TaskStats) -> None:
        """Add one part."""
        for name, value in part:
            if isinstance(value, int):
                self.numbers[name] += value
            else:
                self.counts[name].update(value)

    def total(self) -> TaskStats:
        """The sum so far, the same for any order of the parts."""
        counts = {name: dict(sorted(count.items())) for name, count in self.counts.items()}
        return TaskStats(**self.numbers, **counts)


def add_stats(parts: Iterable[TaskStats]) -> TaskStats:
    """The sum of several counts."""
    total = StatsSum()
    for part in parts:
        total.add(part)
    return total.total()


def add_counts(parts: Iterable[Mapping[KeyT, int]]) -> dict[KeyT, int]:
    """The sum of several counts by key, in the order of the keys."""
    total: Counter[KeyT] = Counter()
    for part in parts:
        if part:  # most documents have none, and `update` takes a microsecond
            total.update(part)
    return dict(sorted(total.items()))


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
        mixed_tokens=stats.mixed_tokens,
        notes=stats.notes,
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
