"""Tables of rows: sorted by key, counted, and the columns of their sides."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from headrace.schemas.shards.shard_format import SIDES


def count_tokens(table: pa.Table) -> int:
    """Tokens in all rows of a table, on both sides of a pair."""
    return sum(len(chunk.flatten()) for ids, _ in sides(table) for chunk in table[ids].chunks)


def sides(table: pa.Table) -> list[tuple[str, str]]:
    """The names of the columns of ids and masks: one side, or two in preference sets."""
    return [(ids, mask) for ids, mask in SIDES if ids in table.column_names]


def sort_rows(tables: Iterable[pa.Table]) -> pa.Table:
    """Sort rows by their keys; rows of equal keys keep the order in which they came."""
    table = pa.concat_tables(tables).combine_chunks()
    order = np.argsort(table["row_key"].to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks()
