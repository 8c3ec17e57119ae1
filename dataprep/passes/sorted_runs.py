"""Rows between tasks and shards: sorted files, of which any range of keys is read on its own."""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.dataprep.passes.limit_rank import RowCuts, ranks
from headrace.dataprep.rows.row_tables import SortedRows, sort_rows
from headrace.dataprep.work.workspace import Workspace, rows_path, work_folder
from headrace.schemas.shards.arrow_numbers import numbers_of

KEYS = 1 << 64

KeyRange = tuple[int, int]  # keys [low, high)
ALL_KEYS = (0, KEYS)


def cut_keys(keys: KeyRange, parts: int) -> list[KeyRange]:
    """A range of keys, cut into equal parts."""
    low, high = keys
    bounds = [low + (high - low) * part // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def overlapping(parts: list[KeyRange], keys: KeyRange) -> range:
    """Return those of some adjoining, ordered ranges that have keys in common with `keys`."""
    lows = [low for low, _ in parts]
    return range(max(0, bisect_right(lows, keys[0]) - 1), bisect_left(lows, keys[1]))


class Spool:
    """The rows of one split of a task, sorted by key and written in a few large batches."""

    def __init__(self, space: Workspace, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.unfinished = space.temporary(path)
        self.writer = pa.ipc.new_file(str(self.unfinished), schema)
        self.held: list[pa.Table] = []
        self.held_tokens = 0
        self.most_tokens = space.budgets.held_tokens
        self.long_row = space.budgets.long_row

    def add(self, rows: pa.Table, tokens: int) -> None:
        """Take one block's rows."""
        self.held.append(rows)
        self.held_tokens += tokens
        if self.held_tokens >= self.most_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one sorted batch."""
        rows, self.held, self.held_tokens = sort_rows(self.held, self.long_row), [], 0
        self.writer.write_table(rows.copy())

    def close(self) -> tuple[Path, Path]:
        """End the file, also where there are no rows: a file not seen is an error.

        Returns:
            Where it lies, and where it belongs.
        """
        if self.held:
            self.flush()
        self.writer.close()
        return self.unfinished, self.path


@dataclass(frozen=True)
class Runs:
    """Sorted files of one level that hold all rows of one split.

    Level 0 has a file for each task, in which each batch is sorted. A file of a higher level has
    the rows of one of `groups` groups of tasks, in one of `ranges` equal ranges of keys, sorted
    throughout.

    Args:
        tokens: in all files; decides only how many rows are gathered at once.
        work_key: identifies the rows.
        cuts: rows of level 0 that are left out; higher levels do not have them any more.
    """

    split: str
    groups: int
    tokens: int
    work_key: str
    level: int = 0
    ranges: int = 1
    cuts: RowCuts = RowCuts(0)  # noqa: RUF009  frozen

    def path(self, output: Path, group: int, key_range: int) -> Path:
        """One file."""
        if self.level == 0:
            return rows_path(output, group, self.split)
        return work_folder(output) / f"merge-{self.level}.{group}.{key_range}.{self.split}.arrow"

    def read_sorted(
        self,
        space: Workspace,
        groups: Iterable[int],
        keys: KeyRange,
        tokens: int,
        schema: pa.Schema,
    ) -> Iterator[SortedRows]:
        """The rows with these keys, in key order, in parts that fit in memory.

        A part's rows may lie in mapped files, and must be copied before the next is asked for.

        Args:
            tokens: of all these rows, about.
        """
        budgets = space.budgets
        parts = max(1, -(-tokens // budgets.gathered_tokens))
        ranges = overlapping(cut_keys(ALL_KEYS, self.ranges), keys)
        cuts = cut_keys(keys, parts)
        files = [
            RunFile(self.path(space.output, group, r), cuts, self.cuts.seed, self.cuts.top(group))
            for group in groups
            for r in ranges
        ]
        for part in range(parts):
            yield sort_rows(
                [schema.empty_table(), *gather(files, part, budgets.slices_at_once)],
                budgets.long_row,
            )
            for file in files:
                file.forget()


class RunFile:
    """One file, mapped and not read, and where in its batches adjoining ranges of keys begin.

    Args:
        seed, top: rows of a rank from `top` on are left out; None: no row is.
    """

    def __init__(
        self, path: Path, parts: list[KeyRange], seed: int = 0, top: int | None = None
    ) -> None:
        self.seed, self.top = seed, top
        with path.open("rb") as file:  # the mapping outlives the descriptor
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(self.map))
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        self.batches = [(batch, cut_batch(batch, parts)) for batch in batches]
        self.forget()

    def rows(self, part: int) -> Iterator[pa.Table]:
        """The rows in one of the ranges, from each batch that has any."""
        for batch, cuts in self.batches:
            start, end = cuts[part], cuts[part + 1]
            if end > start:
                yield pa.Table.from_batches([self.choose(batch.slice(start, end - start))])

    def choose(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows that are not left out."""
        if self.top is None:
            return rows
        stays = ranks(numbers_of(rows.column("row_key")), self.seed) < np.uint64(self.top)
        return rows.filter(pa.array(stays))

    def forget(self) -> None:
        """Let go of the pages that were read, which count as this process's memory."""
        self.map.madvise(mmap.MADV_DONTNEED)


def cut_batch(batch: pa.RecordBatch, parts: list[KeyRange]) -> list[int]:
    """The rows of a sorted batch at which the ranges begin, and the one at which the last ends."""
    keys = numbers_of(batch.column("row_key"))
    lows = np.array([low for low, _ in parts], np.uint64)
    high = parts[-1][1]
    end = len(keys) if high >= KEYS else int(np.searchsorted(keys, np.uint64(high)))
    return [*np.searchsorted(keys, lows).tolist(), end]


def gather(files: list[RunFile], part: int, slices_at_once: int) -> list[pa.Table]:
    """The rows in one range of keys, in the order of the files, where they lie.

    Of more than `slices_at_once` pieces all but the last are copied out of the files.
    """
    found: list[pa.Table] = []
    mapped: list[pa.Table] = []
    first = 0  # of the files that are mapped in
    for number, file in enumerate(files, start=1):
        mapped += file.rows(part)
        if len(mapped) >= slices_at_once and number < len(files):
            found.append(pa.concat_tables(mapped).combine_chunks())
            mapped = []
            for done in files[first:number]:
                done.forget()
            first = number
    return found + mapped
