"""Tables of rows: sorted by key, copied once, counted, and the columns of their sides."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.schemas.shards.arrow_numbers import as_arrow, numbers_of
from headrace.schemas.shards.shard_format import SIDES

LONG_ROW = 128  # tokens on average, from which on copying row by row beats Arrow's `take`

Order = npt.NDArray[np.int64]


def count_tokens(table: pa.Table) -> int:
    """Tokens in all rows of a table, on both sides of a pair."""
    return sum(len(chunk.flatten()) for ids, _ in sides(table) for chunk in table[ids].chunks)


def sides(table: pa.Table) -> list[tuple[str, str]]:
    """The names of the columns of ids and masks: one side, or two in preference sets."""
    return [(ids, mask) for ids, mask in SIDES if ids in table.column_names]


class SortedRows(NamedTuple):
    """Rows of several tables in an order, none of them copied yet."""

    tables: list[pa.Table]
    order: Order

    def after(self, rest: pa.Table) -> "SortedRows":
        """Return the same rows behind those of another table."""
        order = np.append(np.arange(rest.num_rows), self.order + rest.num_rows)
        return SortedRows([rest, *self.tables], order)

    def copy(self, start: int = 0, end: int | None = None) -> pa.Table:
        """Return rows start to end as one table, which holds nothing of the others."""
        order = self.order[start:end]
        schema = self.tables[0].schema
        long = [ids for ids, _ in sides(self.tables[0]) if is_long(self.tables, ids)]
        short = pa.concat_tables(
            table.select([name for name in schema.names if name not in long])
            for table in self.tables
        )
        columns = dict(
            zip(short.column_names, short.combine_chunks().take(as_arrow(order)), strict=True)
        )
        for name in long:
            columns[name] = take_lists(chunks_of(self.tables, name), order)
        return pa.table([columns[name] for name in schema.names], schema=schema).combine_chunks()


def sort_rows(tables: Iterable[pa.Table]) -> SortedRows:
    """Sort rows by their keys; rows of equal keys keep the order in which they came."""
    tables = list(tables)
    keys = np.concatenate([numbers_of(table["row_key"]) for table in tables])
    return SortedRows(tables, np.argsort(keys, kind="stable"))


def chunks_of(tables: Sequence[pa.Table], name: str) -> list[pa.ListArray]:
    """Return the arrays of a column, of all tables."""
    return [chunk for table in tables for chunk in table[name].chunks]


def is_long(tables: Sequence[pa.Table], name: str) -> bool:
    """Return whether a column's lists are long and none of them is null."""
    chunks = chunks_of(tables, name)
    tokens = sum(len(chunk.flatten()) for chunk in chunks)
    rows = sum(map(len, chunks))
    return tokens >= LONG_ROW * max(1, rows) and not any(chunk.null_count for chunk in chunks)


def take_lists(chunks: Sequence[pa.ListArray], order: Order) -> pa.ListArray:
    """Return lists of int32 in an order, copied one by one from where they lie.

    The copy lies in Arrow's memory, of which pages are used again.
    """
    values = [numbers_of(chunk.values) for chunk in chunks]
    bounds = [numbers_of(chunk.offsets) for chunk in chunks]
    owners = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])[order]
    starts = np.concatenate([bound[:-1] for bound in bounds])[order]
    ends = np.concatenate([bound[1:] for bound in bounds])[order]
    pieces = [
        values[owner][start:end]
        for owner, start, end in zip(owners.tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]
    offsets = np.append(0, np.cumsum(ends - starts)).astype(np.int32)
    content = pa.allocate_buffer(4 * int(offsets[-1]))
    if pieces:
        np.concatenate(pieces, out=np.frombuffer(content, np.int32))
    flat = pa.Array.from_buffers(pa.int32(), int(offsets[-1]), [None, content])
    return pa.ListArray.from_arrays(as_arrow(offsets), flat)
