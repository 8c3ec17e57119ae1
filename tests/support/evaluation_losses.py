"""Losses of a model by transformers' own forward, over the evaluation rows of shards."""

import torch

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.batches.batch import make_batch
from headrace.trainer.layers.device import document_mask, position_ids
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.row_source import RowSource
from headrace.trainer.shards.shard_reader import ShardReader

ROWS = 9  # as max_rows in the config


def evaluation_loss(model, shards):
    """Transformers' own forward over the evaluation rows, documents masked from each other."""
    manifest = read_manifest(shards)
    order = RowOrder(list_row_groups([manifest], "evaluation"), 0, window=1, shuffle=False)
    reader = ShardReader(
        DecodedRows,
        RowSource(
            directories=[shards], manifests=[manifest], split="evaluation", held_row_groups=1
        ),
    )
    total, count = 0.0, 0
    for index in range(ROWS):
        rows = [[[reader.row(order[index])]]]
        batch = make_batch(rows, manifest.sequence_len, Position(), OverlongCount())
        lengths = batch.document_lengths[0]
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids[0],
                attention_mask=document_mask(lengths, torch.device("cpu")),
                position_ids=position_ids(lengths),
                use_cache=False,
            ).logits
        labels = batch.labels[0]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten().long(), ignore_index=-100, reduction="sum"
        ).item()
        count += batch.trained_tokens
    return total / count
