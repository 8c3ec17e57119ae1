"""One row group of a shard, in the shard format's columns, whoever wrote the file."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.schemas.named_files import check_regular
from headrace.schemas.shards.foreign_columns import as_shard_table, key_seed_of
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.parquet_pages import reader_of
from headrace.schemas.shards.shard_checks import check_schema, check_size, check_unpacked


def open_shard(
    path: Path, manifest: Manifest, shard: ShardRecord, groups: range | None = None
) -> pq.ParquetFile:
    """Open a shard whose row groups are such that can be read; pages are checked as they are.

    Args:
        groups: the row groups that will be read. Default: all.

    Raises:
        DataError: no regular file.
        ValueError, OSError, pa.ArrowException: not the columns or sizes that the manifest declares.
    """
    check_regular(path)
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"{size} bytes, the manifest says {shard.bytes}")
    dictionaries = repeated_text(manifest)
    file = pq.ParquetFile(path, read_dictionary=dictionaries, page_checksum_verification=True)
    check_schema(file.schema_arrow, manifest)
    if file.num_row_groups != len(shard.row_groups):
        raise ValueError(
            f"{file.num_row_groups} row groups, the manifest has {len(shard.row_groups)}"
        )
    names = columns_of(manifest, file.schema_arrow.names)
    with path.open("rb") as pages:
        for index in groups or range(file.num_row_groups):
            group = file.metadata.row_group(index)
            check_size(group, manifest, shard.row_groups[index], names)
            check_unpacked(group, names, reader_of(pages))
    return file


def columns_of(manifest: Manifest, ours: Sequence[str]) -> Sequence[str]:
    """Return the columns of a file that are read: of foreign ones those with a role."""
    return ours if manifest.columns is None else manifest.columns.names()


def repeated_text(manifest: Manifest) -> list[str]:
    """Return the columns of text that are read as they lie in dictionaries, each text once."""
    source = manifest.columns.source if manifest.columns else "source"
    return [source] if source else []


def read_row_group(
    file: pq.ParquetFile,
    group: int,
    manifest: Manifest,
    shard: ShardRecord,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Return the rows of a row group.

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
