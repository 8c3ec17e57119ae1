"""What finished tasks counted, and how it becomes the manifest's sources and token ledger."""

from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from headrace.schemas.manifest import SourceRecord

QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)


class TaskStats(BaseModel):
    """Counts of one task, or of several added up. `documents` leaves out the refused ones."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    tokens_in: int = 0
    rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    rejects: dict[str, int] = {}
    document_lengths: dict[int, int] = {}

    @property
    def rejected(self) -> int:
        """Refused documents."""
        return sum(self.rejects.values())


def add_stats(parts: Iterable[TaskStats]) -> TaskStats:
    """The sum of several counts."""
    documents, tokens_in = 0, 0
    counters: dict[str, Counter[str]] = {
        "rows": Counter(),
        "tokens": Counter(),
        "rejects": Counter(),
    }
    lengths: Counter[int] = Counter()
    for part in parts:
        documents += part.documents
        tokens_in += part.tokens_in
        for name, counter in counters.items():
            counter.update(getattr(part, name))
        lengths.update(part.document_lengths)
    return TaskStats(
        documents=documents,
        tokens_in=tokens_in,
        rows=dict(counters["rows"]),
        tokens=dict(counters["tokens"]),
        rejects=dict(counters["rejects"]),
        document_lengths=dict(lengths),
    )


def source_record(name: str, stats: TaskStats) -> SourceRecord:
    """One source's line in the manifest. Without loss masks every token is trained."""
    tokens = sum(stats.tokens.values())
    return SourceRecord(
        name=name,
        documents=stats.documents,
        rejected_documents=stats.rejected,
        rows=sum(stats.rows.values()),
        tokens=tokens,
        trained_tokens=tokens,
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
