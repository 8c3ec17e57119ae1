"""Rows between tasks and shards: sorted files, of which any range of keys is read on its own."""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.dataprep.blocks import sort_rows
from headrace.dataprep.workspace import Workspace, rows_path, work_folder
from headrace.schemas.publish import rename_durably

KEYS = 1 << 64
HELD_TOKENS = (
    1 << 23
)  # 32 MiB of ids are sorted and written at once; that takes three times as much
GATHERED_TOKENS = 1 << 23  # and so many read at once

KeyRange = tuple[int, int]  # keys [low, high)
ALL_KEYS = (0, KEYS)


def cut_keys(keys: KeyRange, parts: int) -> list[KeyRange]:
    """A range of keys, cut into equal parts."""
    low, high = keys
    bounds = [low + (high - low) * part // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def overlapping(parts: list[KeyRange], keys: KeyRange) -> range:
    """Which of some adjoining ranges, in order, have keys in common with `keys`."""
    lows = [low for low, _ in parts]
    return range(max(0, bisect_right(lows, keys[0]) - 1), bisect_left(lows, keys[1]))


def parts_of(tokens: int) -> int:
    """In how many parts to gather rows of so many tokens, so that each fits in memory."""
    return max(1, -(-tokens // GATHERED_TOKENS))


class Spool:
    """The rows of one split of a task, sorted by key and written in a few large batches."""

    def __init__(self, space: Workspace, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.unfinished = space.temporary(path)
        self.writer = pa.ipc.new_file(str(self.unfinished), schema)
        self.held: list[pa.Table] = []
        self.held_tokens = 0

    def add(self, rows: pa.Table, tokens: int) -> None:
        """Take one block's rows."""
        self.held.append(rows)
        self.held_tokens += tokens
        if self.held_tokens >= HELD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one sorted batch."""
        rows, self.held, self.held_tokens = sort_rows(self.held), [], 0
        self.writer.write_table(rows)

    def publish(self) -> None:
        """Put the file in its place, also where there are no rows: a file not seen is an error."""
        if self.held:
            self.flush()
        self.writer.close()
        rename_durably(self.unfinished, self.path)


@dataclass(frozen=True)
class Runs:
    """All rows of one split, as the files of one level.

    Level 0 has a file for each task, in which each batch is sorted. A file of a higher level has
    the rows of one of `groups` groups of tasks, in one of `ranges` equal ranges of keys, sorted
    throughout.

    Args:
        tokens: in all files; decides only how many rows are gathered at once.
        work_key: identifies the rows.
    """

    split: str
    groups: int
    tokens: int
    work_key: str
    level: int = 0
    ranges: int = 1

    def path(self, output: Path, group: int, key_range: int) -> Path:
        """One file."""
        if self.level == 0:
            return rows_path(output, group, self.split)
        return work_folder(output) / f"merge-{self.level}.{group}.{key_range}.{self.split}.arrow"

    def read_sorted(
        self, output: Path, groups: Iterable[int], keys: KeyRange, parts: int, schema: pa.Schema
    ) -> Iterator[pa.Table]:
        """The rows with these keys, in key order, as a table for each of so many parts."""
        ranges = overlapping(cut_keys(ALL_KEYS, self.ranges), keys)
        files = [RunFile(self.path(output, group, r)) for group in groups for r in ranges]
        for part in cut_keys(keys, parts):
            yield gather((batch for file in files for batch in file.batches), part, schema)
            for file in files:
                file.forget()


class RunFile:
    """One file, mapped and not read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:  # the mapping outlives the descriptor
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(self.map))
        self.batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]

    def forget(self) -> None:
        """Let go of the pages that were read, which count as this process's memory."""
        self.map.madvise(mmap.MADV_DONTNEED)


def gather(batches: Iterable[pa.RecordBatch], keys: KeyRange, schema: pa.Schema) -> pa.Table:
    """The rows of sorted batches with keys in a range, in key order, copied out of the files."""
    tables = [schema.empty_table()]
    low, high = keys
    for batch in batches:
        found = batch.column("row_key").to_numpy()
        start = int(np.searchsorted(found, np.uint64(low)))
        end = len(found) if high >= KEYS else int(np.searchsorted(found, np.uint64(high)))
        if end > start:
            tables.append(pa.Table.from_batches([batch.slice(start, end - start)]))
    return sort_rows(tables)
