"""Inputs of the training benchmark: a model directory without weights, and real shards."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.dataprep.passes.shard_writer import ShardPlan, describe_shard
from headrace.dataprep.passes.sorted_runs import Runs
from headrace.jobs.tools.bench_shapes import Shape, shape_of
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import Manifest, SourceRecord, TokenizerRecord, TokenLedger
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import TRAIN, shard_file_name, shard_schema

SHORTEST = 16  # tokens of a drawn document, unless its row ends sooner
ROWS_IN_GROUP = 64


def write_model(directory: Path, preset: str, layers: int | None) -> Shape:
    """A config.json, and a file in the place of a tokenizer; returns the config."""
    config = shape_of(preset, layers)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return config


def draw_lengths(generator: np.random.Generator, sequence_len: int, mean: int | None) -> list[int]:
    """Document lengths of one full row: exponential around a mean, or a single document."""
    if mean is None:
        return [sequence_len]
    lengths: list[int] = []
    left = sequence_len
    while left:
        length = min(left, SHORTEST + int(generator.exponential(mean - SHORTEST)))
        lengths.append(length)
        left -= length
    return lengths


def write_shards(
    directory: Path, model: Path, rows: int, sequence_len: int, vocabulary: int, mean: int | None
) -> list[list[int]]:
    """A shard directory of random tokens, through the schema and options of real ones.

    Args:
        mean: mean document length; None for one document a row.

    Returns:
        The lengths of each row's documents.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lengths = [draw_lengths(generator, sequence_len, mean) for _ in range(rows)]
    plan = ShardPlan(Runs(TRAIN, groups=1, tokens=0, work_key=""), index=0, count=1)
    path = directory / shard_file_name(TRAIN, 0)
    with pq.ParquetWriter(path, shard_schema(), **parquet_options()) as writer:
        for start in range(0, rows, ROWS_IN_GROUP):
            group = lengths[start : start + ROWS_IN_GROUP]
            ids = generator.integers(0, vocabulary, (len(group), sequence_len), dtype=np.int32)
            writer.write_table(_table(ids, group, start))
    record = describe_shard(path, plan)
    source = SourceRecord(
        name="random",
        documents=sum(map(len, lengths)),
        rejected_documents=0,
        dropped_documents={},
        rows=rows,
        tokens=record.tokens,
        trained_tokens=record.tokens,
        document_length_quantiles={},
    )
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            fingerprint=file_sha256(model / "tokenizer.json"),
            vocabulary_size=vocabulary,
            special_tokens={},
        ),
        sequence_len=sequence_len,
        packing="none",
        seed=0,
        config_fingerprint="",
        inputs_fingerprint="",
        shards=[record],
        sources=[source],
        ledger=TokenLedger(
            tokens_in=record.tokens, tokens_out={TRAIN: record.tokens}, tokens_dropped={}
        ),
    )
    write_manifest(directory, manifest)
    return lengths


def _table(ids: NDArray[np.int32], lengths: list[list[int]], first: int) -> pa.Table:
    rows = len(lengths)
    columns = {
        "input_ids": pa.array(list(ids), pa.list_(pa.int32())),
        "loss_mask": pa.nulls(rows, pa.list_(pa.bool_())),
        "document_lengths": pa.array(lengths, pa.list_(pa.int32())),
        "source": pa.array(["random"] * rows).dictionary_encode(),
        "row_key": pa.array(range(first, first + rows), pa.uint64()),
        "control_class": pa.nulls(rows, pa.int8()),
    }
    return pa.table(columns).cast(shard_schema())
