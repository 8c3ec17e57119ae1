"""Packed sequences of rows, computed from config and manifests. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import EVALUATION, TRAIN
from headrace.schemas.train.data_config import LoaderConfig
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.order.data_history import DataHistory
from headrace.trainer.order.mixed_order import MixedOrder
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.row_packer import Candidate, RowPacker, Sequences, UnpackedRows
from headrace.trainer.shards.decoded_pairs import PairFacts
from headrace.trainer.shards.decoded_rows import Decoded, RowFacts
from headrace.trainer.shards.packed_rows import PackedRow
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.shard_reader import ShardReader

T = TypeVar("T")

COUNTED_AT_ONCE = 1024  # places


@dataclass(frozen=True)
class RowStream:
    """One split of some shard directories, in an order.

    `epoch_end` gives, for a global row index, where its epoch ends; None: it has no border.
    """

    directories: list[str]
    manifests: list[Manifest]
    split: str
    order: RowOrder | MixedOrder | DataHistory
    held_row_groups: int
    apart: bool
    epoch_end: Callable[[int], int | None]
    loader: LoaderConfig
    of_pairs: bool = False

    @property
    def facts(self) -> type[Decoded[PackedRow]]:
        """Decodes lengths and names alone."""
        return PairFacts if self.of_pairs else RowFacts

    def reader(self, decode: type[Decoded[T]]) -> ShardReader[T]:
        """Reads what the order names."""
        return ShardReader(
            decode,
            self.directories,
            self.manifests,
            self.split,
            self.held_row_groups,
            self.apart,
            self.loader,
        )


def train_stream(config: TrainConfig, data_history: DataHistory) -> RowStream:
    """The train splits of all datasets of a course."""
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
        of_pairs=config.objective.of_pairs,
    )


def evaluation_stream(config: TrainConfig, path: str, manifest: Manifest) -> RowStream:
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
        loader=config.loader.model_copy(update={"on_corrupt": "stop"}),
        of_pairs=config.objective.of_pairs,
    )


def open_sequences(
    sequence_tokens: int,
    stream: RowStream,
    reader: ShardReader[T],
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
    stop_row: int,
    position: Position,
    quarantined: Sequence[QuarantineRecord] = (),
) -> int:
    """Count the sequences from a position to the end.

    Args:
        quarantined: row groups that the run has replaced by others, with rows of other lengths.
    """
    if stream.loader.pack == "none":
        return stop_row - position.next_row
    reader = stream.reader(stream.facts)
    reader.quarantine.restore(quarantined)
    places = open_sequences(sequence_tokens, stream, reader, stop_row, position)
    return sum(map(len, iter(lambda: places.take(COUNTED_AT_ONCE), [])))
