"""The memory that a Parquet row group takes decoded, told by the footer before a byte is read."""

from collections.abc import Collection

import pyarrow.parquet as pq

LARGE = 1 << 28  # bytes; smaller row groups do no harm, whatever they are packed from
MOST_TIMES = 256  # decoded bytes for one in the file; text has 3 to 50
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}


def unpacked_problem(
    group: pq.RowGroupMetaData, columns: Collection[str] | None, large: int = LARGE
) -> str | None:
    """Return why a row group must not be decoded: a small one that unpacks to a very large one.

    Args:
        columns: top-level columns that are read; None: all.
        large: see `is_bomb`.
    """
    for index in range(group.num_columns):
        column = group.column(index)
        if columns is not None and column.path_in_schema.split(".")[0] not in columns:
            continue
        width = WIDTHS.get(column.physical_type, 1)
        size = max(column.total_uncompressed_size, width * column.num_values)
        packed = max(1, column.total_compressed_size)
        if is_bomb(packed, size, large):
            return (
                f"column {column.path_in_schema} unpacks from {packed} to {size} bytes; write the "
                f"file again with row groups of less than {large >> 20} MiB"
            )
    return None


def is_bomb(packed: int, unpacked: int, large: int = LARGE) -> bool:
    """Return whether bytes unpack to more than `large`, and to far more than they are."""
    return unpacked > large and unpacked > MOST_TIMES * max(1, packed)
