"""Rows of unpaired sets: single answers, each with a label. Imports no torch."""

from typing import ClassVar

import pyarrow as pa

from headrace.schemas.shards.arrow_numbers import bools_of, one_chunk
from headrace.trainer.shards.decoded_rows import DecodedRows, Row


class DecodedAnswers(DecodedRows):
    """Answers by their place in the row group."""

    COLUMNS: ClassVar[list[str]] = [*DecodedRows.COLUMNS, "desirable"]

    def __init__(self, table: pa.Table) -> None:
        super().__init__(table)
        self._labels: list[bool] = bools_of(one_chunk(table["desirable"])).tolist()

    def row(self, index: int) -> Row:
        """One answer with its label; its arrays keep the whole group in memory."""
        return super().row(index)._replace(desirable=self._labels[index])
