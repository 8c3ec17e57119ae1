"""The tables that name what `headrace train` reads, and how: `[[datasets]]`,
`[[evaluation_datasets]]`, `[loader]`; and the keys beside them.
"""

from typing import Literal

from pydantic import Field

from headrace.schemas.addresses import Address
from headrace.schemas.config_model import Config, Text
from headrace.schemas.train.adapter_config import AdapterConfig, VisionConfig
from headrace.schemas.train.objective_config import ObjectiveConfig, RejectedSamplingConfig


class DatasetConfig(Config):
    """One `[[datasets]]` table: a shard directory's train split."""

    path: Address = Field(description="Shard directory, or its URL: s3://, gs://, hf://, file://.")
    weight: float = Field(
        1.0, gt=0, description='Share in the mixture, relative to the others; `"interleave"` only.'
    )
    repeats: int = Field(1, ge=1, description="Times that each of its rows comes in an epoch.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens it gives in an epoch, in whole rows of its mean length; "
        "the next epoch takes the next rows. Default: all.",
    )


class EvaluationDatasetConfig(Config):
    """One `[[evaluation_datasets]]` table: a shard directory's evaluation split."""

    path: Address = Field(description="Shard directory, or its URL: s3://, gs://, hf://, file://.")
    name: Text | None = Field(None, description="Name in logs. Default: the directory's name.")
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows. Default: all.")


Overlong = Literal["error", "truncate", "drop"]


class LoaderConfig(Config):
    """`[loader]`."""

    prefetch_batches: int = Field(
        2, ge=0, description="Global batches read ahead by the first stage; 0 reads in line."
    )
    shuffle: bool = Field(
        True,
        description="Another order each epoch. `false`: shard order, shuffled once already.",
    )
    shuffle_window: int = Field(4, ge=1, description="Row groups that are held and mixed at once.")
    pack: Literal["none", "best_fit"] = Field(
        "none",
        description='`"best_fit"`: put several short rows into each place of a micro-batch, as '
        "documents that do not see each other. Evaluation too.",
    )
    tokens_per_row: int | None = Field(
        None,
        ge=2,
        description="Tokens of a place when packing. Default: the largest `sequence_len` of the "
        "datasets.",
    )
    look_ahead: int = Field(256, ge=1, description="Rows to choose from when packing.")
    overlong: Overlong = Field(
        "error",
        description='Rows with more than `tokens_per_row`. `"error"`: shards that may have some '
        'are refused. `"truncate"`: cut. `"drop"`: left out. They are counted in the metrics.',
    )
    prefetch_bytes: int = Field(
        1 << 28, ge=0, description="Most bytes of batches read ahead, one batch apart from that."
    )
    verify: Literal["full", "size", "off"] = Field(
        "size",
        description='Shard files at start: `"size"` compares sizes and footers, `"full"` reads and '
        "hashes them. Row groups are checked whenever they are read.",
    )
    on_corrupt: Literal["stop", "quarantine"] = Field(
        "stop",
        description='`"quarantine"`: train on the rows of another row group in place of one that '
        "is damaged or missing, and keep a record.",
    )
    cache_dir: Text | None = Field(
        None, description="Local folder for what was read from URLs, shared by this machine's runs."
    )
    cache_bytes: int = Field(
        64 << 30, ge=1, description="Largest size of that folder; the oldest row groups go first."
    )
    read_attempts: int = Field(
        8, ge=1, description="Attempts to read from a URL, with growing pauses in between."
    )
    read_timeout: float = Field(60.0, gt=0, description="Longest wait for one of them, in seconds.")


class BatchConfig(Config):
    """Top-level keys of what a step computes."""

    seed: int = Field(
        0, ge=0, description="Root of every random choice: row order, initial adapter, dropout."
    )
    micro_batch_size: int = Field(
        1, ge=1, description="Rows that pass through the pipeline together."
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches per replica and step; more of them fill the pipeline better.",
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is minimized.")
    rejected_sampling: RejectedSamplingConfig | None = Field(
        None,
        description="Rejected answers come from the model as it is before each step. "
        "Default: from the shards.",
    )
    adapter: AdapterConfig = Field(AdapterConfig(), description="What is trained.")
    vision: VisionConfig | None = Field(
        None,
        description="Train on pictures, with the vision tower of the model. Default: its text part "
        "alone.",
    )

    @property
    def places(self) -> int:
        """Return the number of sequences in a micro-batch."""
        return self.micro_batch_size * self.objective.sequences


class DataConfig(BatchConfig):
    """Top-level keys of the rows of a run, and of their order."""

    epochs: int | None = Field(
        None, ge=1, description="Passes over the data. Default 1, unless `max_steps` is given."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of `epochs`.")
    mixing: Literal["concatenate", "interleave"] = Field(
        "concatenate",
        description='`"concatenate"`: rows of all datasets shuffled together. `"interleave"`: '
        "evenly spread by weight, to within one row at any moment.",
    )
    mixing_unit: Literal["tokens", "rows"] = Field(
        "tokens", description="What the weights count; tokens by each dataset's mean row."
    )
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="An epoch ends when one dataset has given its rows, or when all have, the "
        "others going on from their start.",
    )
    datasets: list[DatasetConfig] = Field(
        min_length=1,
        description="Train splits; `mixing` says how several become one.",
    )
    evaluation_datasets: list[EvaluationDatasetConfig] = Field([], description="Evaluation splits.")
    loader: LoaderConfig = Field(LoaderConfig(), description="How shards are read.")

    def evaluation_names(self) -> list[str]:
        """The name of each evaluation dataset, as it appears in logs."""
        return [
            dataset.name or dataset.path.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
            for dataset in self.evaluation_datasets
        ]
