"""Packed sequences of rows, computed from config and manifests. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import EVALUATION, TRAIN
from headrace.schemas.train.data_config import DataConfig
from headrace.schemas.train.objectives import Columns
from headrace.trainer.order.data_history import DataHistory
from headrace.trainer.order.mixed_order import MixedOrder
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.row_packer import Candidate, RowPacker, Sequences, UnpackedRows
from headrace.trainer.shards.decoded_pairs import PairFacts
from headrace.trainer.shards.decoded_rows import Decoded, RowFacts
from headrace.trainer.shards.packed_rows import PackedRow
from headrace.trainer.shards.row_groups import RowAddress, list_row_groups
from headrace.trainer.shards.row_source import RowSource

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

COUNTED_AT_ONCE = 1024  # places


@dataclass(frozen=True, kw_only=True)
class RowStream(RowSource):
    """One split of some shard directories, in an order.

    `epoch_end` gives, for a global row index, where its epoch ends; None: it has no border.
    """

    order: RowOrder | MixedOrder | DataHistory
    epoch_end: Callable[[int], int | None]
    columns: Columns = "rows"

    @property
    def facts(self) -> type[Decoded[PackedRow]]:
        """Decodes lengths and names alone."""
        return PairFacts if self.columns == "pairs" else RowFacts


class RowReader(Protocol[T_co]):
    """A reader of rows by address, which decodes a row when it is wanted."""

    def row(self, address: RowAddress) -> T_co:
        """Return one row."""

    def locate(self, address: RowAddress) -> tuple[Decoded[T_co], int]:
        """Return the row's decoded row group, and its place in there."""


def train_stream(config: DataConfig, data_history: DataHistory) -> RowStream:
    """Return the train splits of all datasets of a run."""
    phases = data_history.phases
    return RowStream(
        directories=[dataset.path for phase in phases for dataset in phase.segment.datasets],
        manifests=[manifest for phase in phases for manifest in phase.manifests],
        split=TRAIN,
        order=data_history,
        held_row_groups=config.loader.shuffle_window,
        apart=any(phase.plan.schedule is not None for phase in phases),
        epoch_end=data_history.epoch_end,
        loader=config.loader,
        columns=config.objective.record.columns,
    )


def evaluation_stream(config: DataConfig, path: str, manifest: Manifest) -> RowStream:
    """One evaluation split in file order, and no other row in place of a damaged one."""
    groups = list_row_groups([manifest], EVALUATION)
    return RowStream(
        directories=[path],
        manifests=[manifest],
        split=EVALUATION,
        order=RowOrder(groups, config.seed, window=1, shuffle=False),
        held_row_groups=1,
        apart=False,
        epoch_end=lambda index: None,
        loader=config.loader,
        may_replace=False,
        columns=config.objective.record.columns,
    )


def open_sequences(
    sequence_tokens: int,
    stream: RowStream,
    reader: RowReader[T],
    stop_row: int | None,
    position: Position,
) -> Sequences[Callable[[], T]]:
    """The places of a stream from a position on; each row is decoded when it is called."""
    order, loader = stream.order, stream.loader

    def look_inside(index: int) -> Candidate[Callable[[], T]]:
        rows, number = reader.locate(order[index])
        return Candidate(rows.lengths[number], partial(rows.row, number))

    if loader.pack == "none":
        assert stop_row is not None
        return UnpackedRows(lambda index: partial(reader.row, order[index]), stop_row, position)
    return RowPacker(
        look_inside,
        tokens=sequence_tokens,
        look_ahead=loader.look_ahead,
        overlong=loader.overlong,
        epoch_end=stream.epoch_end,
        stop_row=stop_row,
        position=position,
    )


def count_sequences(
    sequence_tokens: int,
    stream: RowStream,
    reader: RowReader[PackedRow],
    stop_row: int,
    position: Position,
) -> int:
    """Count the sequences from a position to the end.

    Args:
        reader: of `stream.facts`; it is read of only where rows are packed.
    """
    if stream.loader.pack == "none":
        return stop_row - position.next_row
    places = open_sequences(sequence_tokens, stream, reader, stop_row, position)
    return sum(map(len, iter(lambda: places.take(COUNTED_AT_ONCE), [])))
