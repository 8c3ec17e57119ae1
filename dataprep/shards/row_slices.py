"""Parts of finished shards, read again: which rows are taken, and the keys that they get."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from headrace.dataprep.passes.row_limits import row_tokens
from headrace.dataprep.passes.row_rank import permute_keys
from headrace.dataprep.passes.shard_writer import Target, count_trained
from headrace.dataprep.passes.sorted_runs import Spool
from headrace.dataprep.rows.row_tables import count_tokens
from headrace.dataprep.work.workspace import read_marker, rows_path, write_marker
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import rename_durably
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.shard_format import SPLITS, TOKEN_COLUMNS, TRAIN

PORTION_TOKENS = 1 << 26  # a task of its own, with a marker


@dataclass(frozen=True)
class RowSlice:
    """The first `rows` rows of the row groups [start, end) of one shard.

    Portions are numbered in their split, directories as they were given.
    """

    number: int
    directory: int
    path: str
    sha256: str
    bytes: int
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
        return fingerprint([asdict(self) | {"path": ""}, asdict(rekeying)])


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


@dataclass(frozen=True)
class TakenGroup:
    """A row group of a shard, of which the first `rows` rows are taken, and their tokens."""

    shard: ShardRecord
    index: int
    rows: int
    tokens: int


def plan_row_slices(
    directories: Sequence[Path], manifests: Sequence[Manifest], weights: Sequence[float] | None
) -> list[RowSlice]:
    """Plan the rows to read: all, or the train rows with the lowest keys, to the weight's share.

    Keys are hashes, so the lowest of them are a random sample.
    """
    quotas: dict[str, list[int | None]] = {split: [None] * len(manifests) for split in SPLITS}
    if weights is not None:
        quotas[TRAIN] = train_quotas(manifests, weights)
    return [
        row_slice
        for split in SPLITS
        for row_slice in plan_split(split, directories, manifests, quotas[split])
    ]


def plan_split(
    split: str,
    directories: Sequence[Path],
    manifests: Sequence[Manifest],
    quotas: Sequence[int | None],
) -> Iterator[RowSlice]:
    """The portions of one split, up to so many tokens of each directory."""
    number = 0
    for directory, path in enumerate(directories):
        shards = manifests[directory].split(split)
        for groups in together(take_groups(path, shards, quotas[directory])):
            shard, first = groups[0].shard, groups[0].index
            yield RowSlice(
                number=number,
                directory=directory,
                path=str(path / shard.file),
                sha256=shard.sha256,
                bytes=shard.bytes,
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
    directory: Path, shards: Sequence[ShardRecord], quota: int | None
) -> Iterator[TakenGroup]:
    """The row groups of a split in key order, as far as `quota` tokens go; rows stay whole."""
    left = quota
    for shard in shards:
        for index, group in enumerate(shard.row_groups):
            if left is None or group.tokens <= left:
                yield TakenGroup(shard, index, group.rows, group.tokens)
                left = None if left is None else left - group.tokens
                continue
            with open_shard(directory / shard.file, shard.bytes) as file:
                names = [name for name in file.schema_arrow.names if name in TOKEN_COLUMNS]
                ends = np.cumsum(row_tokens(file.read_row_group(index, columns=names)))
            rows = int(np.searchsorted(ends, left, side="right"))
            if rows:
                yield TakenGroup(shard, index, rows, int(ends[rows - 1]))
            return


def together(groups: Iterable[TakenGroup]) -> Iterator[list[TakenGroup]]:
    """Consecutive row groups of one shard, up to `PORTION_TOKENS`."""
    held: list[TakenGroup] = []
    for group in groups:
        tokens = sum(other.tokens for other in held) + group.tokens
        if held and (held[0].shard is not group.shard or tokens > PORTION_TOKENS):
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
    with open_shard(Path(row_slice.path), row_slice.bytes) as file:
        for index in range(row_slice.start, row_slice.end):
            rows = read_rows(file, row_slice.path, index, target.schema).slice(0, left)
            left -= rows.num_rows
            counts = count_rows(rows, row_slice.split)
            stats.add(counts)
            spool.add(rekeying.apply(rows, row_slice.directory), counts.tokens(row_slice.split))
    if left or stats.tokens(row_slice.split) != row_slice.tokens:
        raise DataError(
            f"{row_slice.path}: not what its manifest says; prepare the directory again"
        )
    rename_durably(*spool.close())
    write_marker(target.space, row_slice.name, row_slice.work_key(rekeying), stats)
    return stats


def open_shard(path: Path, size: int) -> pq.ParquetFile:
    """A shard of the size that its manifest gives."""
    if not path.is_file() or path.stat().st_size != size:
        raise DataError(f"{path}: missing, or not what its manifest says; run headrace verify")
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({first_line(error)})") from None


def read_rows(file: pq.ParquetFile, path: str, index: int, schema: pa.Schema) -> pa.Table:
    """One row group with exactly the columns of a shard."""
    try:
        rows = file.read_row_group(index)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {index} is damaged ({first_line(error)})") from None
    if not rows.schema.equals(schema):
        raise DataError(f"{path}: its columns are not those of the shard format")
    return rows.replace_schema_metadata(schema.metadata)


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).partition("\n")[0].rstrip(".")


def count_rows(rows: pa.Table, split: str) -> RowSliceStats:
    """Rows and tokens by source."""
    sources: dict[str, SourceCounts] = {}
    for name in pc.unique(rows["source"].cast(pa.string())).to_pylist():
        own = rows.filter(pc.equal(rows["source"].cast(pa.string()), name))
        sources[name] = SourceCounts(
            rows=own.num_rows, tokens=count_tokens(own), trained_tokens=count_trained(own)
        )
    tokens = sum(counts.tokens for counts in sources.values())
    return RowSliceStats(sources=sources, split_tokens={split: tokens})


def recode(column: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """A column of names over one dictionary, equal in every file."""
    indices = pc.index_in(column.cast(pa.string()), pa.array(names)).combine_chunks()
    return pa.DictionaryArray.from_arrays(indices, pa.array(names))


def set_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """A table with other values in one column."""
    place = rows.schema.get_field_index(name)
    return rows.set_column(place, rows.schema.field(name), values)
