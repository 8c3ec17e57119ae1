"""Bytes a token, and rates of writing and reading, of ways to store token ids in Parquet."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from report import print_table, text_config

from headrace.dataprep.prepare import prepare
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import TRAIN

ROUNDS = 3
IDS = "input_ids.list.element"
SPLIT = {"column_encoding": {IDS: "BYTE_STREAM_SPLIT"}}
WAYS: dict[str, dict[str, Any]] = {
    "as shards are": {},
    "zstd 1": {"compression_level": 1},
    "zstd 6": {"compression_level": 6},
    "zstd 9": {"compression_level": 9},
    "zstd 19": {"compression_level": 19},
    "pages of 1 MiB": {"data_page_size": 1 << 20},
    "plain": {"column_encoding": {IDS: "PLAIN"}},
    "dictionary": {"column_encoding": None, "use_dictionary": ["source", IDS]},
    "DELTA_BINARY_PACKED": {"column_encoding": {IDS: "DELTA_BINARY_PACKED"}},
    "lz4": {"compression": "lz4", "compression_level": None},
    "row groups of 256 Ki tokens": {"rows": 256},
    "row groups of 4 Mi tokens": {"rows": 4096},
}


def measure(table: pa.Table, changes: dict[str, Any]) -> tuple[float, float, float]:
    """Bytes a token, and seconds to write and to read."""
    tokens = len(table["input_ids"].combine_chunks().flatten())
    options = parquet_options() | changes
    rows = options.pop("rows", 1024)
    target = pa.BufferOutputStream()
    started = time.process_time()
    with pq.ParquetWriter(target, table.schema, **options) as writer:
        for start in range(0, table.num_rows, rows):
            writer.write_table(table.slice(start, rows).combine_chunks())
    written = time.process_time()
    data = target.getvalue()
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)
    return data.size / tokens, (written - started), time.process_time() - written


def main() -> None:
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "shards"
        config = text_config(output).model_copy(update={"tokenizer_backend": "fastokens"})
        manifest = prepare(config, 1)
        files = [output / shard.file for shard in manifest.split(TRAIN)]
        table = pa.concat_tables([pq.read_table(path) for path in files]).combine_chunks()
    tokens = manifest.ledger.tokens_out[TRAIN]
    rows = []
    for name, changes in WAYS.items():
        found = [measure(table, changes) for _ in range(ROUNDS)]
        size, writing, reading = (median(column) for column in zip(*found, strict=True))
        rates = (f"{tokens / seconds / 1e6:.0f}" for seconds in (writing, reading))
        rows.append((name, f"{size:.2f}", *rates))
    print_table(
        f"{tokens / 1e6:.1f} M tokens of Python source, rows of 1024; median of {ROUNDS} times of "
        "one core",
        ("", "bytes a token", "written, M tokens/s", "read, M tokens/s"),
        rows,
    )


if __name__ == "__main__":
    main()
