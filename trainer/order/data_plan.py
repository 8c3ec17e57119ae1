"""Rows that an epoch takes of each dataset, and its end, computed from the manifests alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import TRAIN
from headrace.schemas.train.data_config import DataConfig, DatasetConfig
from headrace.trainer.order.mixture import LARGEST_PERIOD, Schedule, whole_parts


@dataclass(frozen=True)
class DataPlan:
    """Rows of an epoch by dataset and, when they are interleaved, the schedule."""

    dataset_rows: list[int]
    schedule: Schedule | None
    stop_at_first: bool  # exhausted dataset; else at the last

    def rows_in(self, epochs: int, seen: Sequence[int] | None = None) -> int:
        """The global row index at which so many epochs end.

        Interleaved, that is right after the last row of the dataset that ends them.

        Args:
            seen: rows that interleaved datasets gave before index 0.
        """
        if self.schedule is None:
            return epochs * sum(self.dataset_rows)
        ends = []
        for dataset, rows in enumerate(self.dataset_rows):
            left = epochs * rows - (seen[dataset] if seen else 0)
            ends.append(self.schedule.index_of(dataset, left - 1) + 1 if left > 0 else 0)
        return min(ends) if self.stop_at_first else max(ends)


@dataclass(frozen=True)
class Size:
    """A train split."""

    rows: int
    tokens: int


def plan_data(config: DataConfig, manifests: Sequence[Manifest]) -> DataPlan:
    """Work out the mixture.

    Raises:
        ConfigError, DataError: a dataset that has or would give no rows.
    """
    sizes = [train_size(manifest) for manifest in manifests]
    interleave = config.mixing == "interleave"
    empty = [d.path for d, size in zip(config.datasets, sizes, strict=True) if not size.rows]
    if len(empty) == len(sizes) or (empty and interleave):
        raise DataError(f"{empty[0]}: the train split has no rows; prepare more text")
    rows = [
        epoch_rows(number, dataset, size)
        for number, (dataset, size) in enumerate(zip(config.datasets, sizes, strict=True))
    ]
    schedule = build_schedule(config, sizes) if interleave else None
    return DataPlan(rows, schedule, config.mixing_stop == "first_exhausted")


def train_size(manifest: Manifest) -> Size:
    shards = manifest.split(TRAIN)
    return Size(sum(shard.rows for shard in shards), sum(shard.tokens for shard in shards))


def epoch_rows(number: int, dataset: DatasetConfig, size: Size) -> int:
    """Rows that one dataset gives in an epoch."""
    rows = size.rows * dataset.repeats
    if dataset.max_tokens is None or not rows:
        return rows
    limit = dataset.max_tokens * size.rows // size.tokens
    if not limit:
        raise ConfigError(
            f"datasets.{number}.max_tokens = {dataset.max_tokens} is less than one row of "
            f"{dataset.path}, about {size.tokens / size.rows:.0f} tokens; raise it"
        )
    return min(rows, limit)


def build_schedule(config: DataConfig, sizes: Sequence[Size]) -> Schedule:
    """Weights of tokens are turned into shares of rows by the mean tokens a row."""
    by_tokens = config.mixing_unit == "tokens"
    weights = [
        Fraction(dataset.weight) * (Fraction(size.rows, size.tokens) if by_tokens else 1)
        for dataset, size in zip(config.datasets, sizes, strict=True)
    ]
    shares = [weight / sum(weights) for weight in weights]
    for number, share in enumerate(shares):
        if share * LARGEST_PERIOD < 1:
            raise ConfigError(
                f"datasets.{number}.weight = {config.datasets[number].weight} asks for less than "
                f"one row in {LARGEST_PERIOD:,}; raise it"
            )
    return Schedule(whole_parts(shares))
