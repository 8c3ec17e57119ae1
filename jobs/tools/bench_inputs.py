"""Inputs of the training benchmark: a model directory without weights, and real shards."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.dataprep.passes.shard_writer import ShardPlan, describe_shard
from headrace.dataprep.passes.sorted_runs import Runs
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import Manifest, SourceRecord, TokenizerRecord, TokenLedger
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import TRAIN, shard_file_name, shard_schema

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, object]] = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "router_aux_loss_coef": 0.9,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
SHORTEST = 16  # tokens of a drawn document, unless its row ends sooner
ROWS_IN_GROUP = 64


def write_model(directory: Path, preset: str, layers: int | None) -> dict[str, int]:
    """A config.json, and a file in the place of a tokenizer; returns the numbers in the config."""
    config = PRESETS[preset] | ({"num_hidden_layers": layers} if layers else {})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return {key: value for key, value in config.items() if type(value) is int}


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
) -> float:
    """A shard directory of random tokens, through the schema and options of real ones.

    Args:
        mean: mean document length; None for one document a row.

    Returns:
        The mean number of tokens that a token attends to, itself included.
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
    return sum(n * (n + 1) / 2 for row in lengths for n in row) / (rows * sequence_len)


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


def matmul_weights(shape: dict[str, int]) -> int:
    """Count the weights that a token is multiplied with.

    These are all but embedding and norms, and of experts those that it is sent to.
    """
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head_size = shape.get("head_dim", hidden // heads)
    attention = 2 * hidden * head_size * (heads + shape["num_key_value_heads"])
    experts = shape.get("num_local_experts") or shape.get("num_experts", 0)
    chosen = shape.get("num_experts_per_tok", 1)
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    layer = attention + 3 * hidden * inner * chosen + hidden * experts
    return shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden


def flops_per_token(shape: dict[str, int], mode: str, attended: float) -> float:
    """Algorithmic operations, recomputation not counted.

    A weight costs 2 forward, 2 for the gradient of its input, and 2 for its own if it is trained; a
    pair of tokens in attention 4 times the heads' sizes forward and twice that backward.
    """
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim", shape["hidden_size"] // heads)
    attention = 3 * 4 * shape["num_hidden_layers"] * heads * head_size * attended
    return (6 if mode == "full" else 4) * matmul_weights(shape) + attention
