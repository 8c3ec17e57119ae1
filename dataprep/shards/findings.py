"""Findings in a sample of a source before a long run: refusals, losses, rows, an estimate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.dataprep.input.records import Reject
from headrace.dataprep.rows.pack_blocks import BlockRows
from headrace.dataprep.rows.task_stats import TaskStats, add_stats
from headrace.dataprep.text.chat_losses import is_loss

KEPT_ROWS = 3  # of each part of a sample


@dataclass(frozen=True)
class Findings:
    """Counts of a sample, a refused document for each reason, and the first rows."""

    stats: TaskStats
    examples: dict[str, Reject]
    rows: list[pa.Table]

    @classmethod
    def of_blocks(cls, blocks: Iterable[BlockRows]) -> "Findings":
        """Return what some blocks give."""
        results = list(blocks)
        examples: dict[str, Reject] = {}
        for reject in (reject for result in results for reject in result.rejects):
            examples.setdefault(reject.reason, reject)
        tables = [table for result in results for table in result.rows.values()]
        rows = [tables[0].slice(0, KEPT_ROWS).combine_chunks()] if tables else []
        return cls(add_stats(result.stats for result in results), examples, rows)

    @classmethod
    def sum(cls, parts: Sequence["Findings"]) -> "Findings":
        """Return what several parts of a sample give together."""
        examples: dict[str, Reject] = {}
        for part in reversed(parts):
            examples |= part.examples
        rows = [table for part in parts for table in part.rows]
        return cls(add_stats(part.stats for part in parts), examples, rows)

    def first_rows(self, count: int) -> list[dict[str, Any]]:
        """The first rows."""
        if not self.rows:
            return []
        rows: list[dict[str, Any]] = pa.concat_tables(self.rows).slice(0, count).to_pylist()
        return rows


@dataclass(frozen=True)
class Estimate:
    """Expected result of a run, to within the sample's error. Duplicates are not foreseen."""

    sampled_bytes: int
    input_bytes: int
    documents: float
    tokens: float
    trained: float
    rows: float
    refused: float
    seconds: float
    stored_bytes: float
    work_bytes: float


def finding_lines(source: str, found: Findings) -> list[str]:
    """Each kind of refusal, drop and loss once, with its count in the sample."""
    stats, lines = found.stats, []
    total = stats.documents + stats.rejected
    for reason, count in stats.rejects.items():
        example = found.examples[reason]
        where = f"{example.file}:{example.line}: {example.detail}"
        lines.append(f"refused: {reason}: {count:,} of {total:,} (first: {where})")
    for reason, count in stats.documents_dropped.items():
        lines.append(f"dropped: {reason}: {count:,} of {total:,}")
    for reason, tokens in stats.tokens_dropped.items():
        if reason not in stats.documents_dropped:
            lines.append(f"dropped: {reason}: {tokens:,} tokens")
    for name, count in stats.notes.items():
        if is_loss(name, count, stats.documents):
            lines.append(f"{name}: {count:,} in {stats.documents:,} documents")
    return [f'source "{source}": {line}' for line in lines]
