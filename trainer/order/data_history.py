"""The rows of a run from its start to its end, over changes of its datasets. Imports no torch."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.schemas.fingerprint import derive_seed, fingerprint
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import TRAIN
from headrace.schemas.train.data_config import DataConfig, LoaderConfig
from headrace.schemas.train.run_state import DataSegment, DatasetRecord
from headrace.trainer.order.data_plan import DataPlan, plan_data
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.mixed_order import MixedOrder
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import RowAddress, list_row_groups
from headrace.trainer.shards.storage import manifest_of

DATASET_SETTINGS = {"path", "weight", "repeats", "max_tokens"}


@dataclass(frozen=True)
class Phase:
    """A segment with what its config and manifests say of it."""

    segment: DataSegment
    manifests: list[Manifest]
    plan: DataPlan

    @property
    def rows_per_epoch(self) -> int:
        return self.plan.rows_in(1)

    @property
    def seen(self) -> list[int]:
        return [dataset.seen for dataset in self.segment.datasets]

    def order(self, config: DataConfig) -> RowOrder | MixedOrder:
        """One order over all datasets, or one for each, mixed."""
        window, shuffle = config.loader.shuffle_window, config.loader.shuffle
        groups = list_row_groups(self.manifests, TRAIN)
        if self.plan.schedule is None:
            return RowOrder(groups, config.seed, window, shuffle, self.plan.dataset_rows)
        orders = [
            RowOrder(
                groups.pick(groups.dataset == index),
                derive_seed(config.seed, "dataset", dataset.number),
                window,
                shuffle,
            )
            for index, dataset in enumerate(self.segment.datasets)
        ]
        return MixedOrder(self.plan.schedule, orders, self.seen)

    def end(self, epochs: int) -> int:
        """The global row index at which so many epochs of the run end."""
        if self.plan.schedule is None:
            left = epochs - int(self.segment.epoch)
            return self.segment.first_row + max(left, 0) * self.rows_per_epoch
        return self.segment.first_row + self.plan.rows_in(epochs, self.seen)

    def epoch_end(self, index: int) -> int | None:
        """Return the row at which the epoch of a row ends; None for interleaved datasets."""
        if self.plan.schedule is not None:
            return None
        first, rows = self.segment.first_row, self.rows_per_epoch
        return first + ((index - first) // rows + 1) * rows

    def epoch_at(self, rows: int) -> float:
        """Epochs done after so many rows of the run."""
        return self.segment.epoch + (rows - self.segment.first_row) / self.rows_per_epoch


class DataHistory:
    """The phases of a run one after the other, of which the last has no end."""

    def __init__(self, phases: Sequence[Phase], config: DataConfig) -> None:
        self.phases = phases
        self.first_rows = [phase.segment.first_row for phase in phases]
        self.orders = [phase.order(config) for phase in phases]
        self.first_datasets = [0]
        for phase in phases:
            self.first_datasets.append(self.first_datasets[-1] + len(phase.manifests))
        self.offsets = [
            int(phase.segment.epoch) * phase.rows_per_epoch if phase.plan.schedule is None else 0
            for phase in phases
        ]

    def __getitem__(self, index: int) -> RowAddress:
        """The row at a global index; datasets are counted over all phases."""
        number = self._number(index)
        row = index - self.first_rows[number] + self.offsets[number]
        address = self.orders[number][row]
        if not number:
            return address
        group = address.row_group
        shifted = group._replace(dataset=group.dataset + self.first_datasets[number])
        return RowAddress(shifted, address.row)

    def epoch_end(self, index: int) -> int | None:
        """Up to where rows may be packed with that one; None: without end."""
        number = self._number(index)
        end = self.phases[number].epoch_end(index)
        if number + 1 == len(self.phases):
            return end
        following = self.first_rows[number + 1]
        return following if end is None else min(end, following)

    def epoch_at(self, rows: int) -> float:
        """Epochs done after so many rows of the run."""
        return self.phases[self._number(max(rows, self.first_rows[0]))].epoch_at(rows)

    def stop_row(
        self, config: DataConfig, global_batch_rows: int, step: int, position: Position
    ) -> int | None:
        """Return the row at which the data ends: by `epochs`, or by the steps left of `max_steps`.

        Args:
            position: after `step` steps.
        """
        if not config.max_steps:
            return max(self.phases[-1].end(config.epochs or 1), position.next_row)
        if config.loader.pack != "none":
            return None
        return position.next_row + (config.max_steps - step) * global_batch_rows

    def _number(self, index: int) -> int:
        return bisect_right(self.first_rows, index) - 1


def open_history(
    config: DataConfig, inputs: Inputs, history: Sequence[DataSegment], first_row: int
) -> DataHistory:
    """Return the phases from a row on; segments that were over before it are left out.

    Raises:
        DataError, CheckpointError: a dataset of an earlier segment is still needed and is not there
            as it was.
    """
    last = history[-1] if history else segment_of(config, inputs)
    phases = [Phase(last, inputs.train, inputs.plan)]
    for segment, following in zip(history[-2::-1], history[:0:-1], strict=True):
        if following.first_row > first_row:
            phases.insert(0, reopen(config.loader, segment, following.first_row))
    return DataHistory(phases, config)


def reopen(loader: LoaderConfig, segment: DataSegment, stop_row: int) -> Phase:
    """Return the phase of an earlier segment."""
    tables = [dataset.model_dump(include=DATASET_SETTINGS) for dataset in segment.datasets]
    mixing = segment.model_dump(include={"mixing", "mixing_unit", "mixing_stop"})
    keys = {"datasets": tables} | (mixing if segment.mixing == "interleave" else {})
    manifests = [manifest_of(dataset.path, loader) for dataset in segment.datasets]
    for dataset, manifest in zip(segment.datasets, manifests, strict=True):
        if manifest_fingerprint(manifest) != dataset.fingerprint:
            raise CheckpointError(
                f"{dataset.path}: not as it was when the run began with it, and needed as it was "
                f"up to row {stop_row}; restore it, or start a new run in another output_dir"
            )
    return Phase(segment, manifests, plan_data(DataConfig.model_validate(keys), manifests))


def segment_of(config: DataConfig, inputs: Inputs) -> DataSegment:
    """The only segment of a run whose data never changes."""
    return DataSegment(
        first_row=0,
        epoch=0.0,
        mixing=config.mixing,
        mixing_unit=config.mixing_unit,
        mixing_stop=config.mixing_stop,
        datasets=[
            DatasetRecord(
                fingerprint=manifest_fingerprint(manifest),
                number=number,
                **table.model_dump(include=DATASET_SETTINGS),
            )
            for number, (table, manifest) in enumerate(
                zip(config.datasets, inputs.train, strict=True)
            )
        ],
    )


def manifest_fingerprint(manifest: Manifest) -> str:
    """Tells whether a shard directory is the same."""
    return fingerprint(manifest.identity())


def resume_history(
    history: Sequence[DataSegment], config: DataConfig, inputs: Inputs, next_row: int
) -> list[DataSegment]:
    """The run's segments with the config's data as the last one.

    Other data than so far begins where the epoch in progress ends, and where datasets are
    interleaved at once, each going on in its own order after the rows that it has given.

    Args:
        next_row: the first row that no batch has looked at.

    Raises:
        ConfigError: a run that interleaves cannot go on with concatenation.
    """
    now = segment_of(config, inputs)
    if not history or same_data(history[-1], now):
        return list(history) or [now]
    begun = [segment for segment in history if segment.first_row <= next_row]
    old = begun[-1]
    if same_data(old, now):
        return begun
    phase = reopen(config.loader, old, next_row)
    rows = next_row - old.first_row
    if phase.plan.schedule is None:
        epochs = -(-rows // phase.rows_per_epoch)
        first_row = old.first_row + epochs * phase.rows_per_epoch
        epoch = old.epoch + epochs
        given = [epochs * dataset_rows for dataset_rows in phase.plan.dataset_rows]
    elif now.mixing == "concatenate":
        raise ConfigError(
            'mixing = "concatenate": the run interleaves its datasets, and rows seen in part of '
            'an epoch cannot be told apart after that; keep mixing = "interleave"'
        )
    else:
        first_row, epoch = next_row, phase.epoch_at(next_row)
        given = phase.plan.schedule.rows_before(rows)
    seen = [dataset.seen + count for dataset, count in zip(old.datasets, given, strict=True)]
    datasets = carry_over(now.datasets, old.datasets, seen, begun)
    update = {"first_row": first_row, "epoch": epoch, "datasets": datasets}
    return [*begun, now.model_copy(update=update)]


def same_data(one: DataSegment, other: DataSegment) -> bool:
    """Return whether two segments mix the same datasets in the same way."""
    position: dict[str, object] = {"first_row": 0, "epoch": 0.0}

    def settings(segment: DataSegment) -> DataSegment:
        datasets = [
            dataset.model_copy(update={"number": 0, "seen": 0, "path": ""})
            for dataset in segment.datasets
        ]
        return segment.model_copy(update={**position, "datasets": datasets})

    return settings(one) == settings(other)


def carry_over(
    datasets: Sequence[DatasetRecord],
    old: Sequence[DatasetRecord],
    seen: Sequence[int],
    history: Sequence[DataSegment],
) -> list[DatasetRecord]:
    """Each dataset with the number and the rows that it had, told by content; new ones at 0."""
    left = {index: dataset.fingerprint for index, dataset in enumerate(old)}
    unused = 1 + max(dataset.number for segment in history for dataset in segment.datasets)
    result = []
    for dataset in datasets:
        index = next((i for i, known in left.items() if known == dataset.fingerprint), None)
        if index is None:
            result.append(dataset.model_copy(update={"number": unused, "seen": 0}))
            unused += 1
            continue
        del left[index]
        update = {"number": old[index].number, "seen": seen[index]}
        result.append(dataset.model_copy(update=update))
    return result


def describe_change(segment: DataSegment) -> str:
    """Describe what a change of the data means, row by row."""
    lines = [f"other data from row {segment.first_row:,} on, after {segment.epoch:.3f} epochs:"]
    for dataset in segment.datasets:
        what = f"{dataset.seen:,} of its rows came before" if dataset.seen else "new"
        lines.append(f"  {dataset.path}: {what}")
    return "\n".join(lines)
