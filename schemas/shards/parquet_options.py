"""The options of Parquet that decide the bytes of a shard; measured in docs/shard-format.md."""

from typing import Any

from headrace.schemas.shards.shard_kind import ShardKind

# Parquet options that decide a shard's bytes; measured in docs/shard-format.md
COMPRESSION = "zstd"


COMPRESSION_LEVEL = 3


PARQUET_VERSION = "2.6"


PAGE_BYTES = 4 << 20


BYTE_STREAM_SPLIT_COLUMNS: dict[ShardKind, tuple[str, ...]] = {
    "causal": ("input_ids.list.element",),
    "preference": ("input_ids.list.element", "rejected_input_ids.list.element"),
    "unpaired": ("input_ids.list.element",),
}


def parquet_options(kind: ShardKind = "causal") -> dict[str, Any]:
    """Return the arguments of `pyarrow.parquet.ParquetWriter` that shards are written with."""
    return {
        "version": PARQUET_VERSION,
        "compression": COMPRESSION,
        "compression_level": COMPRESSION_LEVEL,
        "use_dictionary": ["source"],
        "column_encoding": dict.fromkeys(BYTE_STREAM_SPLIT_COLUMNS[kind], "BYTE_STREAM_SPLIT"),
        "write_statistics": ["row_key"],
        "data_page_size": PAGE_BYTES,
        "write_page_checksum": True,
    }
