"""Loaders over given rows in a given order, for any replica."""

import itertools
from dataclasses import replace
from functools import partial

from headrace.schemas.train.data_config import LoaderConfig
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.order.sequences import RowStream, open_sequences
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.packed_rows import places_in_order
from headrace.trainer.shards.shard_reader import ShardReader

GLOBAL_BATCH = 8  # places


def open_loader(
    stream,
    stop_row,
    sequence_tokens,
    replica=0,
    replicas=1,
    micro_batch_size=1,
    prefetch=0,
    **packing,
):
    """The loader of one replica, at the start."""
    if packing:
        settings = stream.loader.model_dump(exclude_unset=True) | {"pack": "best_fit", **packing}
        stream = replace(stream, loader=LoaderConfig.model_validate(settings))
    reader = ShardReader(DecodedRows, stream)
    return GroupLoader(
        reader,
        partial(open_sequences, sequence_tokens, stream, reader, stop_row),
        sequence_tokens=sequence_tokens,
        micro_batch_size=micro_batch_size,
        micro_batches=GLOBAL_BATCH // replicas // micro_batch_size,
        replica=replica,
        replicas=replicas,
        prefetch=prefetch,
    )


def open_stream(directory, manifest, order, config=None):
    """The train split of one directory, two row groups held."""
    return RowStream(
        directories=[str(directory)],
        manifests=[manifest],
        split="train",
        order=order,
        held_row_groups=2,
        apart=False,
        epoch_end=partial(end_of_epoch, order.rows_per_epoch),
        loader=config or LoaderConfig(),
    )


def global_batches(loaders, count):
    """Row keys of the first global batches, in order, from the loaders of all replicas."""
    return [
        [row.row_key for place in places_in_order([part.rows for part in parts]) for row in place]
        for parts in itertools.islice(zip(*loaders, strict=True), count)
    ]


def end_of_epoch(rows, index):
    """Where the epoch of a row ends when each has so many."""
    return (index // rows + 1) * rows
