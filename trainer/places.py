"""Which rows go into which places, from config and manifests. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.manifest import Manifest
from headrace.schemas.shard_format import EVALUATION, TRAIN
from headrace.schemas.train_config import LoaderConfig, TrainConfig
from headrace.trainer.decoded_rows import Decoded, RowFacts
from headrace.trainer.mixed_order import MixedOrder
from headrace.trainer.position import Position
from headrace.trainer.preflight import Inputs
from headrace.trainer.row_order import RowOrder
from headrace.trainer.row_packer import Looked, Places, RowPacker, SingleRows
from headrace.trainer.shard_reader import ShardReader, list_row_groups

T = TypeVar("T")

COUNTED_AT_ONCE = 1024  # places


@dataclass(frozen=True)
class RowStream:
    """One split of some shard directories, in an order.

    `epoch_rows` is None where epochs have no borders in the order.
    """

    directories: list[str]
    manifests: list[Manifest]
    split: str
    order: RowOrder | MixedOrder
    held_row_groups: int
    apart: bool
    epoch_rows: int | None
    loader: LoaderConfig

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


def train_stream(config: TrainConfig, inputs: Inputs) -> RowStream:
    """The train splits of all datasets."""
    order = build_order(config, inputs)
    return RowStream(
        directories=[dataset.path for dataset in config.datasets],
        manifests=inputs.train,
        split=TRAIN,
        order=order,
        held_row_groups=config.loader.shuffle_window,
        apart=isinstance(order, MixedOrder),
        epoch_rows=order.rows_per_epoch if isinstance(order, RowOrder) else None,
        loader=config.loader,
    )


def build_order(config: TrainConfig, inputs: Inputs) -> RowOrder | MixedOrder:
    """One order over all datasets, or one for each, mixed."""
    window, shuffle = config.loader.shuffle_window, config.loader.shuffle
    groups = list_row_groups(inputs.train, TRAIN)
    plan = inputs.plan
    if plan.schedule is None:
        return RowOrder(groups, config.seed, window, shuffle, plan.dataset_rows)
    orders = [
        RowOrder(
            groups.pick(groups.dataset == dataset),
            derive_seed(config.seed, "dataset", dataset),
            window,
            shuffle,
        )
        for dataset in range(len(inputs.train))
    ]
    return MixedOrder(plan.schedule, orders)


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
        epoch_rows=None,
        loader=config.loader.model_copy(update={"on_corrupt": "stop"}),
    )


def open_places(
    place_tokens: int,
    stream: RowStream,
    reader: ShardReader[T],
    stop_row: int | None,
    position: Position,
) -> Places[Callable[[], T]]:
    """The places of a stream from a position on; each row is decoded when it is called."""
    order, loader = stream.order, stream.loader

    def look_inside(index: int) -> Looked[Callable[[], T]]:
        rows, number = reader.locate(order[index])
        return Looked(rows.lengths[number], partial(rows.row, number))

    if loader.pack == "none":
        assert stop_row is not None
        return SingleRows(lambda index: partial(reader.row, order[index]), stop_row, position)
    return RowPacker(
        look_inside,
        tokens=place_tokens,
        look_ahead=loader.look_ahead,
        overlong=loader.overlong,
        epoch_rows=stream.epoch_rows,
        stop_row=stop_row,
        position=position,
    )


def count_places(place_tokens: int, stream: RowStream, stop_row: int, position: Position) -> int:
    """How many places there are from a position to the end."""
    if stream.loader.pack == "none":
        return stop_row - position.next_row
    reader = stream.reader(RowFacts)
    places = open_places(place_tokens, stream, reader, stop_row, position)
    return sum(map(len, iter(lambda: places.take(COUNTED_AT_ONCE), [])))
