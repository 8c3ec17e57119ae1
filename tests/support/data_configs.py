"""Manifests and training configs from a few numbers."""

from headrace.schemas.shards.manifest import Manifest, RowGroupRecord, ShardRecord
from headrace.schemas.train.train_config import TrainConfig


def make_manifest(groups, tokens_a_row):
    """One train shard with row groups of so many rows."""
    shard = ShardRecord.model_construct(
        file="shard-00000.parquet",
        split="train",
        rows=sum(groups),
        tokens=sum(groups) * tokens_a_row,
        row_groups=[RowGroupRecord.model_construct(rows=rows) for rows in groups],
    )
    return Manifest.model_construct(shards=[shard], sources=[])


def make_config(*datasets, **changes):
    settings = {
        "model": "m",
        "output_dir": "o",
        "optimizer": {"lr": 1.0},
        "datasets": [{"path": f"d{number}", **keys} for number, keys in enumerate(datasets)],
    }
    return TrainConfig.model_validate(settings | changes)
