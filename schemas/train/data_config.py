"""The tables that name what `headrace train` reads, and how: `[[datasets]]`,
`[[evaluation_datasets]]`, `[loader]`.
"""

from typing import Literal

from pydantic import Field

from headrace.schemas.addresses import Address
from headrace.schemas.config_model import Config, Text


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
