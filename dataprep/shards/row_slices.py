"""Parts of finished shards, read again: which rows are taken, and the keys that they get."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel

from headrace.dataprep.passes.row_limits import row_tokens
from headrace.dataprep.passes.shard_writer import Target, count_trained
from headrace.dataprep.passes.sorted_runs import Spool
from headrace.dataprep.rows.picture_rows import (
    has_pictures,
    row_picture_bytes,
    row_pictures,
    weight,
)
from headrace.dataprep.rows.row_keys import permute_keys
from headrace.dataprep.rows.row_tables import count_tokens
from headrace.dataprep.rows.task_stats import add_counts
from headrace.dataprep.work.workspace import read_marker, rows_path, write_marker
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import rename_durably
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_checks import OPTIONAL_COLUMNS
from headrace.schemas.shards.shard_format import SPLITS, TOKEN_COLUMNS, TRAIN
from headrace.schemas.shards.shard_rows import open_shard, read_row_group

IDENTITY = ("number", "directory", "split", "start", "end", "rows", "tokens")


@dataclass(frozen=True)
class RowSlice:
    """The first `rows` rows of the row groups [start, end) of one shard.

    Portions are numbered in their split, directories as they were given.
    """

    number: int
    directory: int
    path: str
    manifest: Manifest  # of its directory, with this shard alone
    split: str
    start: int
    end: int
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """The name of its marker."""
        return f"portion-{self.number:06d}.{self.split}"

    def work_key(self, rekeying: "Rekeying") -> str:
        """Return the key of its rows: it depends on the shard's content, but not on its path."""
        own = {name: getattr(self, name) for name in IDENTITY}
        return fingerprint([own | {"sha256": self.shard.sha256}, asdict(rekeying)])

    @property
    def shard(self) -> ShardRecord:
        """The shard that it is a part of."""
        return self.manifest.shards[0]

    @property
    def groups(self) -> range:
        """The row groups it takes rows of."""
        return range(self.start, self.end)


@dataclass(frozen=True)
class Rekeying:
    """New keys, and the names of all sources. Without a seed the keys stay."""

    sources: tuple[str, ...]
    seed: int | None

    def apply(self, rows: pa.Table, directory: int) -> pa.Table:
        """The rows with their new keys, over the dictionary of all sources."""
        rows = set_column(rows, "source", recode(rows["source"], self.sources))
        if self.seed is None:
            return rows
        keys = permute_keys(rows["row_key"].to_numpy(), self.seed, "repartition", directory)
        return set_column(rows, "row_key", pa.array(keys))


class SourceCounts(BaseModel):
    """Counts of the rows taken of one source."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0


class RowSliceStats(BaseModel):
    """Counts of one portion, or of several added up."""

    sources: dict[str, SourceCounts] = {}
    split_tokens: dict[str, int] = {}
    pictures: dict[str, int] = {}
    picture_bytes: dict[str, int] = {}

    def weight(self, split: str) -> int:
        """Return what the rows of a split take in memory and files, in tokens."""
        return weight(self.tokens(split), self.picture_bytes.get(split, 0))

    def tokens(self, split: str) -> int:
        """Tokens of one split."""
        return self.split_tokens.get(split, 0)

    def add(self, other: "RowSliceStats") -> None:
        """Add other counts."""
        for name, counts in other.sources.items():
            own = self.sources.setdefault(name, SourceCounts())
            own.rows += counts.rows
            own.tokens += counts.tokens
            own.trained_tokens += counts.trained_tokens
        for split, tokens in other.split_tokens.items():
            self.split_tokens[split] = self.tokens(split) + tokens
        self.pictures = add_counts([self.pictures, other.pictures])
        self.picture_bytes = add_counts([self.picture_bytes, other.picture_bytes])


@dataclass(frozen=True)
class TakenGroup:
    """A row group of a shard, of which the first `rows` rows are taken, and their tokens."""

    shard: ShardRecord
    index: int
    rows: int
    tokens: int


def plan_row_slices(
    directories: Sequence[Path],
    manifests: Sequence[Manifest],
    weights: Sequence[float] | None,
    most_tokens: int,
) -> list[RowSlice]:
    """Plan the rows to read: all, or the train rows with the lowest keys, to the weight's share.

    Keys are hashes, so the lowest of them are a random sample.

    Args:
        most_tokens: in one slice.
    """
    quotas: dict[str, list[int | None]] = {split: [None] * len(manifests) for split in SPLITS}
    if weights is not None:
        quotas[TRAIN] = train_quotas(manifests, weights)
    return [
        row_slice
        for split in SPLITS
        for row_slice in plan_split(split, directories, manifests, quotas[split], most_tokens)
    ]


def plan_split(
    split: str,
    directories: Sequence[Path],
    manifests: Sequence[Manifest],
    quotas: Sequence[int | None],
    most_tokens: int,
) -> Iterator[RowSlice]:
    """The portions of one split, up to so many tokens of each directory."""
    number = 0
    for directory, path in enumerate(directories):
        manifest = manifests[directory]
        for groups in together(take_groups(path, manifest, split, quotas[directory]), most_tokens):
            shard, first = groups[0].shard, groups[0].index
            yield RowSlice(
                number=number,
                directory=directory,
                path=str(path / shard.file),
                manifest=manifest.model_copy(update={"shards": [shard]}),
                split=split,
                start=first,
                end=first + len(groups),
                rows=sum(group.rows for group in groups),
                tokens=sum(group.tokens for group in groups),
            )
            number += 1


def train_quotas(manifests: Sequence[Manifest], weights: Sequence[float]) -> list[int | None]:
    """Train tokens to take of each directory: the most that these shares allow, none twice."""
    held = [sum(shard.tokens for shard in manifest.split(TRAIN)) for manifest in manifests]
    shares = [Fraction(weight) for weight in weights]
    most = min(tokens / share for tokens, share in zip(held, shares, strict=True))
    return [int(most * share) for share in shares]


def take_groups(
    directory: Path, manifest: Manifest, split: str, quota: int | None
) -> Iterator[TakenGroup]:
    """The row groups of a split in key order, as far as `quota` tokens go; rows stay whole."""
    left = quota
    for shard in manifest.split(split):
        for index, group in enumerate(shard.row_groups):
            if left is None or group.tokens <= left:
                yield TakenGroup(shard, index, group.rows, group.tokens)
                left = None if left is None else left - group.tokens
                continue
            tokens = row_lengths(directory / shard.file, manifest, shard, index)
            ends = np.cumsum(tokens)
            rows = int(np.searchsorted(ends, left, side="right"))
            if rows:
                yield TakenGroup(shard, index, rows, int(ends[rows - 1]))
            return


def row_lengths(
    path: Path, manifest: Manifest, shard: ShardRecord, index: int
) -> NDArray[np.integer[Any]]:
    """Tokens of each row of one row group."""
    with reading(path), open_shard(path, manifest, shard, range(index, index + 1)) as file:
        names = [name for name in file.schema_arrow.names if name in TOKEN_COLUMNS]
        return row_tokens(
            checked_rows(read_row_group(file, index, manifest, shard, names), manifest)
        )


def together(groups: Iterable[TakenGroup], most_tokens: int) -> Iterator[list[TakenGroup]]:
    """Consecutive row groups of one shard, up to so many tokens."""
    held: list[TakenGroup] = []
    for group in groups:
        tokens = sum(other.tokens for other in held) + group.tokens
        if held and (held[0].shard is not group.shard or tokens > most_tokens):
            yield held
            held = []
        held.append(group)
    if held:
        yield held


def finished_row_slice(
    target: Target, rekeying: Rekeying, row_slice: RowSlice
) -> RowSliceStats | None:
    """The counts of a portion that an earlier run finished, or None."""
    output = target.space.output
    return read_marker(output, row_slice.name, row_slice.work_key(rekeying), RowSliceStats)


def run_row_slice(target: Target, rekeying: Rekeying, row_slice: RowSlice) -> RowSliceStats:
    """Read rows, give them their keys, and write them sorted.

    Raises:
        DataError: the shard is damaged, or not what its manifest says.
    """
    path = rows_path(target.space.output, row_slice.number, row_slice.split)
    spool = Spool(target.space, path, target.schema)
    stats = RowSliceStats()
    left = row_slice.rows
    for rows in read_row_slice(row_slice, target.schema):
        rows = rows.slice(0, left)
        left -= rows.num_rows
        counts = count_rows(rows, row_slice.split)
        stats.add(counts)
        spool.add(rekeying.apply(rows, row_slice.directory), counts.weight(row_slice.split))
    if left or stats.tokens(row_slice.split) != row_slice.tokens:
        raise DataError(
            f"{row_slice.path}: not what its manifest says; prepare the directory again"
        )
    rename_durably(*spool.close())
    write_marker(target.space, row_slice.name, row_slice.work_key(rekeying), stats)
    return stats


def read_row_slice(row_slice: RowSlice, schema: pa.Schema) -> Iterator[pa.Table]:
    """The row groups of a slice, each checked, with exactly the columns of a shard.

    Raises:
        DataError: naming the shard, and the row group where one is damaged.
    """
    path, manifest, shard = Path(row_slice.path), row_slice.manifest, row_slice.shard
    with reading(path):
        file = open_shard(path, manifest, shard, row_slice.groups)
    with file:
        for index in row_slice.groups:
            with reading(path, index):
                rows = checked_rows(read_row_group(file, index, manifest, shard), manifest)
                yield with_columns(rows, schema)


@contextmanager
def reading(path: Path, group: int | None = None) -> Iterator[None]:
    """Turn what is wrong with a shard into an error that names it, and what to do."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        where = str(path) if group is None else f"{path}: row group {group}"
        raise DataError(
            f"{where}: {' '.join(str(error).split())}; run `headrace verify {path.parent}`"
        ) from None


def checked_rows(rows: pa.Table, manifest: Manifest) -> pa.Table:
    """The rows of a row group, if they keep the format's contract. Raises ValueError."""
    for problem in problems_in_rows(rows, manifest):
        raise ValueError(problem)
    return rows


def with_columns(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with exactly the columns of a shard, without a class where none is given.

    Raises:
        ValueError: a column that this release does not know.
    """
    if unknown := sorted(set(rows.column_names) - set(schema.names)):
        raise ValueError(f"column {unknown[0]} is none of the shard format")
    for name in OPTIONAL_COLUMNS - set(rows.column_names):
        rows = rows.append_column(schema.field(name), pa.nulls(len(rows), schema.field(name).type))
    return rows.select(schema.names).cast(schema)


def count_rows(rows: pa.Table, split: str) -> RowSliceStats:
    """Rows and tokens by source."""
    sources: dict[str, SourceCounts] = {}
    for name in pc.unique(rows["source"].cast(pa.string())).to_pylist():
        own = rows.filter(pc.equal(rows["source"].cast(pa.string()), name))
        sources[name] = SourceCounts(
            rows=own.num_rows, tokens=count_tokens(own), trained_tokens=count_trained(own)
        )
    tokens = sum(counts.tokens for counts in sources.values())
    stats = RowSliceStats(sources=sources, split_tokens={split: tokens})
    if has_pictures(rows):
        stats.pictures = {split: int(row_pictures(rows).sum())}
        stats.picture_bytes = {split: int(row_picture_bytes(rows).sum())}
    return stats


def recode(column: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """A column of names over one dictionary, equal in every file."""
    indices = pc.index_in(column.cast(pa.string()), pa.array(names)).combine_chunks()
    return pa.DictionaryArray.from_arrays(indices, pa.array(names))


def set_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """A table with other values in one column."""
    place = rows.schema.get_field_index(name)
    return rows.set_column(place, rows.schema.field(name), values)
