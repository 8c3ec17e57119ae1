"""Rows of preference sets: two answers to one prompt. Imports no torch."""

from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from headrace.trainer.shards.decoded_rows import DecodedRows, ListColumn, Row, RowFacts
from headrace.trainer.shards.packed_rows import PackedRow

SIDES = 2  # places of a pair


class Pair(NamedTuple):
    """Prompt and better answer, prompt and worse answer: a document each."""

    chosen: Row
    rejected: Row


class DecodedPairs:
    """Pairs by their place in the row group. `lengths` are those of the longer side."""

    COLUMNS: ClassVar[list[str]] = [
        *DecodedRows.COLUMNS,
        "rejected_input_ids",
        "rejected_loss_mask",
    ]

    def __init__(self, table: pa.Table) -> None:
        self._chosen = DecodedRows(table)
        rejected = ListColumn(table["rejected_input_ids"])
        self._ids, self._ends = rejected.flat(), rejected.offsets
        self._mask = ListColumn(table["rejected_loss_mask"])
        self.lengths: list[int] = np.maximum(self._chosen.lengths, np.diff(self._ends)).tolist()

    def row(self, index: int) -> Pair:
        """One pair; its arrays keep the whole group in memory."""
        chosen = self._chosen.row(index)
        start, stop = self._ends[index : index + 2].tolist()
        rejected = chosen._replace(
            input_ids=self._ids[start:stop],
            loss_mask=self._mask.bits(index),
            document_lengths=np.array([stop - start], np.int32),
        )
        return Pair(chosen, rejected)


class PairFacts:
    """`DecodedPairs` without the tokens; a pair's tokens are those of both sides."""

    COLUMNS: ClassVar[list[str]] = [*RowFacts.COLUMNS, "rejected_input_ids"]

    def __init__(self, table: pa.Table) -> None:
        self._chosen = RowFacts(table)
        self._rejected: list[int] = np.diff(
            ListColumn(table["rejected_input_ids"]).offsets
        ).tolist()
        self.lengths = [
            max(sides) for sides in zip(self._chosen.lengths, self._rejected, strict=True)
        ]

    def row(self, index: int) -> PackedRow:
        """One pair."""
        chosen = self._chosen.row(index)
        return chosen._replace(tokens=chosen.tokens + self._rejected[index])
