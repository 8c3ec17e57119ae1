"""A shard directory as large as you like: one small file under many names."""

import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.passes.shard_writer import describe_shard
from headrace.schemas.shards.manifest import Manifest, SourceRecord, TokenizerRecord, TokenLedger
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import shard_file_name, shard_schema

VOCABULARY = 49_152


def make_sparse(directory, shards, sequence_len=4096, rows_in_group=256, groups=4):
    """`shards` equal files of `groups` row groups of random ids, as rare as words are.

    Returns:
        Its manifest; no file of it is written. Row keys repeat from shard to shard.
    """
    directory.mkdir(exist_ok=True)
    path = directory / shard_file_name("train", 0)
    generator = np.random.default_rng(0)
    rows = rows_in_group * groups
    with pq.ParquetWriter(path, shard_schema(), **parquet_options()) as writer:
        for group in range(groups):
            writer.write_table(
                make_rows(generator, group * rows_in_group, rows_in_group, sequence_len)
            )
    record = describe_shard(
        path, SimpleNamespace(file=path.name, runs=SimpleNamespace(split="train"))
    )
    records = [record]
    for number in range(1, shards):
        name = shard_file_name("train", number)
        os.link(path, directory / name)
        records.append(record.model_copy(update={"file": name}))
    tokens = shards * rows * sequence_len
    source = SourceRecord(
        name="words",
        documents=shards * rows,
        rejected_documents=0,
        rows=shards * rows,
        tokens=tokens,
        trained_tokens=tokens,
        document_length_quantiles={},
    )
    return Manifest(
        tokenizer=TokenizerRecord(
            fingerprint="none", vocabulary_size=VOCABULARY, special_tokens={}
        ),
        sequence_len=sequence_len,
        packing="concatenate",
        seed=0,
        config_fingerprint="none",
        inputs_fingerprint="none",
        shards=records,
        sources=[source],
        ledger=TokenLedger(tokens_in=tokens, tokens_out={"train": tokens}, tokens_dropped={}),
    )


def make_rows(generator, first, rows, sequence_len):
    """Rows of two documents each, with keys from `first` on."""
    ids = np.minimum(generator.zipf(1.2, rows * sequence_len), VOCABULARY) - 1
    offsets = np.arange(rows + 1, dtype=np.int32)
    lengths = np.tile([sequence_len // 3, sequence_len - sequence_len // 3], rows)
    columns = {
        "input_ids": pa.ListArray.from_arrays(
            pa.array(offsets * sequence_len), pa.array(ids.astype(np.int32))
        ),
        "loss_mask": pa.nulls(rows, pa.list_(pa.bool_())),
        "document_lengths": pa.ListArray.from_arrays(
            pa.array(offsets * 2), pa.array(lengths.astype(np.int32))
        ),
        "source": pa.array(["words"] * rows).dictionary_encode(),
        "row_key": pa.array(np.arange(first, first + rows, dtype=np.uint64)),
        "control_class": pa.nulls(rows, pa.int8()),
    }
    return pa.table(columns, schema=shard_schema())
