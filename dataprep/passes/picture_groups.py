"""Row groups of rows with pictures, which end by rows or by bytes."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from headrace.dataprep.rows.picture_rows import Counts, row_picture_bytes
from headrace.dataprep.rows.row_tables import SortedRows


def picture_groups(
    parts: Iterable[SortedRows], size: int, most_bytes: int, schema: pa.Schema
) -> Iterator[pa.Table]:
    """The rows of all parts in tables of `size` rows, or of fewer whose pictures have `most_bytes`;
    they do not depend on how the rows came in parts.
    """
    rest = schema.empty_table()
    for part in parts:
        rows = part.after(rest)
        start = 0
        for end in group_ends(ordered_bytes(rows), size, most_bytes):
            yield rows.copy(start, end)
            start = end
        rest = rows.copy(start)
        del part, rows  # large, and not needed while the next is gathered
    if rest.num_rows:
        yield rest


def ordered_bytes(rows: SortedRows) -> Counts:
    """Return the bytes of each row's pictures, in order."""
    sizes = [row_picture_bytes(table) for table in rows.tables]
    return np.concatenate([np.zeros(0, np.int64), *sizes])[rows.order]


def group_ends(sizes: Counts, size: int, most_bytes: int) -> Iterator[int]:
    """Yield where groups end that are full, or would be too large with the next row."""
    start, held = 0, 0
    for place, row in enumerate(sizes.tolist()):
        if place > start and (place - start == size or held + row > most_bytes):
            yield place
            start, held = place, 0
        held += row
