"""Damaged row groups, and the ones whose rows are trained on in their place."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.publish import write_atomic
from headrace.schemas.shards.manifest import ShardRecord
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer.shards.row_groups import CorruptRowGroupError, RowGroup, keyed_permutation

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
CANDIDATES = 64  # row groups that are tried; where so many are unreadable, the dataset is gone


class NamedFile(Protocol):
    """A file of a dataset, as far as damage in it is written down."""

    @property
    def name(self) -> str: ...

    @property
    def record(self) -> ShardRecord: ...


class RowGroupReader(Protocol):
    """A reader of row groups, which raises `CorruptRowGroupError` where one is damaged."""

    @property
    def files(self) -> Sequence[Sequence[NamedFile]]: ...  # of each dataset

    def read(self, row_group: RowGroup) -> pa.Table: ...


class Quarantine:
    """Reads row groups; a damaged one is given up for good and another read in its place.

    Row i of a damaged row group becomes row i modulo n of another one with n rows, of the same
    dataset. Which one depends on the place of the damaged one alone, as long as that is readable:
    so it is the same for every layout. What was given up stays so in a resumed run, even when the
    file has been restored, which keeps the rows of the run the same.

    Args:
        allowed: without it, damage is an error; what `restore` brought is replaced all the same.
    """

    def __init__(self, source: RowGroupReader, allowed: bool) -> None:
        self.source = source
        self.allowed = allowed
        self._records: dict[tuple[str, int], QuarantineRecord] = {}
        self._new: deque[QuarantineRecord] = deque()

    def restore(self, records: Iterable[QuarantineRecord]) -> None:
        """Take up what an earlier process of the run has given up."""
        self._records |= {(record.file, record.row_group): record for record in records}

    def take_new(self) -> list[QuarantineRecord]:
        """Return the row groups given up since the last call; the reader may run in a thread."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def read(self, row_group: RowGroup) -> pa.Table:
        """The row group's rows, or those in their place."""
        record = self._records.get(self._key(row_group))
        if record is None:
            try:
                return self.source.read(row_group)
            except CorruptRowGroupError as error:
                if not self.allowed:
                    raise
                return self._replace(row_group, error)
        chosen = next(
            other
            for other in self._row_groups(row_group.dataset)
            if self._key(other) == (record.substitute_file, record.substitute_row_group)
        )
        return repeat_rows(self.source.read(chosen), row_group.rows)

    def _replace(self, damaged: RowGroup, error: CorruptRowGroupError) -> pa.Table:
        candidates = self._candidates(damaged)
        for other in candidates:
            try:
                table = self.source.read(other)
            except CorruptRowGroupError as another:
                logger.info("not a substitute: %s", another)
                continue
            record = self._record(damaged, other, error)
            self._records[self._key(damaged)] = record
            self._new.append(record)
            return repeat_rows(table, damaged.rows)
        raise DataError(f"{error}; {len(candidates)} others of its dataset cannot be read either")

    def _candidates(self, damaged: RowGroup) -> list[RowGroup]:
        """Other row groups of the dataset, in an order of the damaged one's own."""
        others = [group for group in self._row_groups(damaged.dataset) if group != damaged]
        seed = derive_seed(0, "substitute", damaged.dataset, damaged.shard, damaged.group)
        return [others[index] for index in keyed_permutation(len(others), seed)[:CANDIDATES]]

    def _row_groups(self, dataset: int) -> Iterator[RowGroup]:
        for shard, file in enumerate(self.source.files[dataset]):
            for group, record in enumerate(file.record.row_groups):
                if record.rows:
                    yield RowGroup(dataset, shard, group, record.rows)

    def _key(self, row_group: RowGroup) -> tuple[str, int]:
        return self.source.files[row_group.dataset][row_group.shard].name, row_group.group

    def _record(
        self, damaged: RowGroup, other: RowGroup, error: CorruptRowGroupError
    ) -> QuarantineRecord:
        file, group = self._key(damaged)
        substitute_file, substitute_row_group = self._key(other)
        first = self.source.files[damaged.dataset][damaged.shard].record.rows_before(group)
        return QuarantineRecord(
            file=file,
            row_group=group,
            first_row=first,
            rows=damaged.rows,
            problem=error.problem,
            substitute_file=substitute_file,
            substitute_row_group=substitute_row_group,
        )


def repeat_rows(table: pa.Table, rows: int) -> pa.Table:
    """The first `rows` rows of a table that begins anew at its end."""
    return table.take(np.arange(rows) % table.num_rows).combine_chunks()


def merge(
    known: list[QuarantineRecord], found: Iterable[QuarantineRecord]
) -> list[QuarantineRecord]:
    """Merge records, each row group once, in the order of file and row group."""
    every = {(record.file, record.row_group): record for record in [*found, *known]}
    return [every[key] for key in sorted(every)]


def describe(record: QuarantineRecord) -> str:
    """One line for the console."""
    last = record.first_row + record.rows - 1
    return (
        f"{record.file}: row group {record.row_group}, rows {record.first_row} to {last} "
        f"({record.problem}); in their place come rows of row group "
        f"{record.substitute_row_group} of {record.substitute_file}"
    )


def write_quarantine(run_directory: Path, records: list[QuarantineRecord]) -> None:
    """Tell the user: `quarantine.jsonl` in the run directory, a line for each row group."""
    lines = [record.model_dump_json() + "\n" for record in records]
    write_atomic(run_directory / QUARANTINE_NAME, "".join(lines))
