"""One row group of a shard, in the shard format's columns, whoever wrote the file."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.schemas.foreign_columns import as_shard_table, key_seed_of
from headrace.schemas.manifest import Manifest, ShardRecord


def read_row_group(
    file: pq.ParquetFile,
    group: int,
    manifest: Manifest,
    shard: ShardRecord,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The rows of a row group.

    Args:
        columns: those to read of our own files, all by default; of foreign ones the five that every
            reader needs are made from what there is.

    Raises:
        ValueError, pa.ArrowException: rows that are not what the manifest declares.
    """
    foreign = manifest.columns
    if foreign is None:
        return file.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
    table = file.read_row_group(group, columns=foreign.names(), use_threads=False)
    source, seed = manifest.sources[0].name, key_seed_of(shard.sha256)
    return as_shard_table(table, foreign, source, seed, shard.rows_before(group))
