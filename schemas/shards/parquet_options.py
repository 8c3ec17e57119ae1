"""The options of Parquet that decide the bytes of a shard; measured in docs/shard-format.md."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from headrace.schemas.shards.shard_format import IMAGE_BYTES, shard_schema
from headrace.schemas.shards.shard_kind import ShardKind

# Parquet options that decide a shard's bytes; measured in docs/shard-format.md
COMPRESSION = "zstd"


COMPRESSION_LEVEL = 3
PLAIN_COMPRESSION: dict[str, Any] = {
    "compression": COMPRESSION,
    "compression_level": COMPRESSION_LEVEL,
}


PARQUET_VERSION = "2.6"


PAGE_BYTES = 4 << 20


BYTE_STREAM_SPLIT_COLUMNS: dict[ShardKind, tuple[str, ...]] = {
    "causal": ("input_ids.list.element",),
    "preference": ("input_ids.list.element", "rejected_input_ids.list.element"),
    "unpaired": ("input_ids.list.element",),
}


def parquet_options(kind: ShardKind = "causal", images: bool = False) -> dict[str, Any]:
    """Return the arguments of `pyarrow.parquet.ParquetWriter` that shards are written with.

    Pictures are packed already, and are not packed again.
    """
    return {
        "version": PARQUET_VERSION,
        **(mixed_compression(kind) if images else PLAIN_COMPRESSION),
        "use_dictionary": ["source"],
        "column_encoding": dict.fromkeys(BYTE_STREAM_SPLIT_COLUMNS[kind], "BYTE_STREAM_SPLIT"),
        "write_statistics": ["row_key"],
        "data_page_size": PAGE_BYTES,
        "write_page_checksum": True,
    }


def mixed_compression(kind: ShardKind) -> dict[str, Any]:
    """Return the compression of each column where there are pictures."""
    packed = [name for name in leaves(shard_schema(kind, images=True)) if name != IMAGE_BYTES]
    return {
        "compression": {**dict.fromkeys(packed, COMPRESSION), IMAGE_BYTES: "none"},
        "compression_level": dict.fromkeys(packed, COMPRESSION_LEVEL),
    }


def leaves(fields: pa.Schema | pa.StructType, prefix: str = "") -> Iterator[str]:
    """Yield the paths of columns as Parquet names them."""
    for index in range(len(fields)):
        field = fields.field(index)
        name, kind = prefix + field.name, field.type
        if pa.types.is_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        if pa.types.is_struct(kind):
            yield from leaves(kind, f"{name}.")
        else:
            yield name
