"""Simulation of the rows that each step of a run will see, from their lengths alone.

Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

from headrace.schemas.shards.shard_format import TRAIN
from headrace.schemas.train.data_config import DataConfig
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.position import Position
from headrace.trainer.order.sequences import open_sequences, train_stream
from headrace.trainer.shards.packed_rows import PackedRow, fill, rows_digest, tokens_by_source
from headrace.trainer.shards.shard_reader import ShardReader

HELD_BYTES_A_TOKEN = 4.2  # of a decoded row group: ids, and a bit for each token's mask
BATCH_BYTES_A_TOKEN = 8  # ids and labels
BATCHES_IN_HAND = 2  # beside those that wait: one being made, one being trained on


@dataclass(frozen=True)
class SimulatedStep:
    """One step, with the names of `StepMetrics`; `next_row` and the last two after it."""

    step: int
    epoch: float
    rows: int
    tokens: int
    fill: float
    source_tokens: dict[str, int]
    overlong_rows: int
    overlong_tokens: int
    first_row: int
    rows_sha256: str
    next_row: int
    row_groups_read: int
    bytes_read: int


def simulate(config: DataConfig, inputs: Inputs) -> Iterator[SimulatedStep]:
    """The steps of a run from its start, as its leader sees them.

    Raises:
        DataError: a shard that cannot be read.
    """
    data_history = open_history(config, inputs, history=[], first_row=0)
    stream = train_stream(config, data_history)
    reader = ShardReader(stream.facts, stream)
    length, capacity = inputs.sequence_tokens, inputs.capacity
    stop_row = data_history.stop_row(config, inputs.global_batch_rows, 0, Position())
    places = open_sequences(length, stream, reader, stop_row, Position())
    for step in islice(count(1), config.max_steps):
        first_row = places.position.next_row
        taken = places.take(inputs.global_batch_rows)
        if not taken:
            return
        rows = [cut(row(), capacity) for row in chain.from_iterable(taken)]
        tokens = sum(row.tokens for row in rows)
        overlong = places.take_overlong()
        yield SimulatedStep(
            step=step,
            epoch=data_history.epoch_at(places.position.rows_done),
            rows=len(rows),
            tokens=tokens,
            fill=fill(tokens, len(taken), capacity),
            source_tokens=tokens_by_source(rows),
            overlong_rows=overlong.rows,
            overlong_tokens=overlong.tokens,
            first_row=first_row,
            rows_sha256=rows_digest(rows),
            next_row=places.position.next_row,
            row_groups_read=reader.row_groups_read,
            bytes_read=reader.bytes_read,
        )


def cut(row: PackedRow, capacity: int) -> PackedRow:
    """Cut a row to the capacity of a sequence."""
    return row._replace(tokens=min(row.tokens, capacity))


def loader_memory(config: DataConfig, inputs: Inputs) -> int:
    """Bytes that loading adds to a leader, at most: row groups, and batches read ahead.

    Rows that wait to be packed keep the row groups of the window before; one more is being read.
    """
    window = config.loader.shuffle_window * (1 if config.loader.pack == "none" else 2)
    groups = [
        [group.tokens for shard in manifest.split(TRAIN) for group in shard.row_groups]
        for manifest in inputs.train
    ]
    if inputs.plan.schedule is None:
        groups = [list(chain.from_iterable(groups))]
    held = sum(sum(sorted(tokens)[-window:]) for tokens in groups)
    read = 2 * max(max(tokens) for tokens in groups if tokens)
    batch = inputs.global_batch_rows // inputs.dims.replicas * inputs.capacity
    batches = config.loader.prefetch_batches + BATCHES_IN_HAND
    return round((held + read) * HELD_BYTES_A_TOKEN) + batches * batch * BATCH_BYTES_A_TOKEN
