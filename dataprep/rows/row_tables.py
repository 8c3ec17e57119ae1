"""Tables of rows: sorted by key, copied once, counted, and the columns of their sides."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.schemas.shards.arrow_numbers import as_arrow, numbers_of
from headrace.schemas.shards.shard_format import SIDES

Order = npt.NDArray[np.int64]


def count_tokens(table: pa.Table) -> int:
    """Tokens in all rows of a table, on both sides of a pair."""
    return sum(len(chunk.flatten()) for ids, _ in sides(table) for chunk in table[ids].chunks)


def sides(table: pa.Table) -> list[tuple[str, str]]:
    """The names of the columns of ids and masks: one side, or two in preference sets."""
    return [(ids, mask) for ids, mask in SIDES if ids in table.column_names]


class SortedRows:
    """Rows of several tables in an order, none of them copied yet.

    Lists of ids are copied row by row where they have `long_row` tokens on average.
    """

    def __init__(self, tables: list[pa.Table], order: Order, long_row: int) -> None:
        self.tables = tables
        self.order = order
        self.long_row = long_row

    def after(self, rest: pa.Table) -> "SortedRows":
        """Return the same rows behind those of another table."""
        order = np.append(np.arange(rest.num_rows), self.order + rest.num_rows)
        return SortedRows([rest, *self.tables], order, self.long_row)

    def copy(self, start: int = 0, end: int | None = None) -> pa.Table:
        """Return rows start to end as one table, which holds nothing of the others."""
        order = self.order[start:end]
        taken = self.short.take(as_arrow(order)).combine_chunks()
        columns = dict(zip(taken.column_names, taken.columns, strict=True))
        columns |= {name: lists.take(order) for name, lists in self.long.items()}
        schema = self.tables[0].schema
        return pa.table([columns[name] for name in schema.names], schema=schema)

    @functools.cached_property
    def long(self) -> "dict[str, Lists]":
        """The columns of ids whose lists are long."""
        found = {ids: Lists.of(self.tables, ids, self.long_row) for ids, _ in sides(self.tables[0])}
        return {name: lists for name, lists in found.items() if lists is not None}

    @functools.cached_property
    def short(self) -> pa.Table:
        """The other columns, of all tables."""
        names = [name for name in self.tables[0].column_names if name not in self.long]
        return pa.concat_tables(table.select(names) for table in self.tables).combine_chunks()


def sort_rows(tables: Iterable[pa.Table], long_row: int) -> SortedRows:
    """Sort rows by their keys; rows of equal keys keep the order in which they came."""
    tables = list(tables)
    keys = np.concatenate([numbers_of(table["row_key"]) for table in tables])
    return SortedRows(tables, np.argsort(keys, kind="stable"), long_row)


class Lists(NamedTuple):
    """Lists of int32 where they lie: of each its array in `values`, and its bounds in there."""

    values: list[npt.NDArray[np.int32]]
    owners: Order
    starts: Order
    ends: Order

    @classmethod
    def of(cls, tables: Sequence[pa.Table], name: str, long_row: int) -> "Lists | None":
        """The lists of a column; None where they are shorter, or some are null."""
        chunks = [chunk for table in tables for chunk in table[name].chunks if len(chunk)]
        if not chunks or any(chunk.null_count for chunk in chunks):
            return None
        bounds = [numbers_of(chunk.offsets).astype(np.int64) for chunk in chunks]
        starts = np.concatenate([bound[:-1] for bound in bounds])
        ends = np.concatenate([bound[1:] for bound in bounds])
        if int((ends - starts).sum()) < long_row * len(starts):
            return None
        owners = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        return cls([numbers_of(chunk.values) for chunk in chunks], owners, starts, ends)

    def take(self, order: Order) -> pa.ListArray:
        """Return some of the lists in an order, copied one by one.

        The copy lies in Arrow's memory, of which pages are used again.
        """
        places = (column[order].tolist() for column in (self.owners, self.starts, self.ends))
        pieces = [self.values[owner][start:end] for owner, start, end in zip(*places, strict=True)]
        offsets = np.append(0, np.cumsum((self.ends - self.starts)[order])).astype(np.int32)
        content = pa.allocate_buffer(4 * int(offsets[-1]))
        if pieces:
            np.concatenate(pieces, out=np.frombuffer(content, np.int32))
        flat = pa.Array.from_buffers(pa.int32(), int(offsets[-1]), [None, content])
        return pa.ListArray.from_arrays(as_arrow(offsets), flat)
