"""Row groups of shard directories: addresses of rows, and the permutation that shuffles them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.schemas.errors import DataError
from headrace.schemas.keyed_hash import mix_numbers, spread
from headrace.schemas.shards.manifest import Manifest


class CorruptRowGroupError(DataError):
    """A row group is not what was written: missing, cut off, or with other bytes or rows.

    Attributes:
        problem: what is wrong with it, without its name and a remedy.
    """

    def __init__(self, message: str, problem: str) -> None:
        super().__init__(message)
        self.problem = problem


class RowGroup(NamedTuple):
    """One Parquet row group: indices of its dataset, of its shard there, of itself in the file."""

    dataset: int
    shard: int
    group: int
    rows: int


class RowAddress(NamedTuple):
    """One row: its row group and its place in it."""

    row_group: RowGroup
    row: int


@dataclass(frozen=True)
class RowGroups:
    """Many row groups, as columns: 16 bytes each."""

    columns: NDArray[np.int32]  # [fields of RowGroup, row groups]

    @classmethod
    def of(cls, groups: Iterable[RowGroup]) -> "RowGroups":
        fields = len(RowGroup._fields)
        flat = np.fromiter((field for group in groups for field in group), dtype=np.int32)
        return cls(flat.reshape(-1, fields).T.copy())

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __getitem__(self, index: int) -> RowGroup:
        return RowGroup(*self.columns[:, index].tolist())

    def pick(self, chosen: NDArray[np.bool_]) -> "RowGroups":
        return RowGroups(self.columns[:, chosen])

    @property
    def dataset(self) -> NDArray[np.int32]:
        return self.columns[0]

    @property
    def rows(self) -> NDArray[np.int32]:
        return self.columns[3]


def keyed_permutation(size: int, seed: int) -> NDArray[np.int64]:
    """A permutation of range(size), the same for every numpy version.

    Sorts the indices by a keyed hash of them.
    """
    mixed = mix_numbers(spread(np.arange(size, dtype=np.uint64), seed))
    return np.argsort(mixed, kind="stable")


def list_row_groups(manifests: Sequence[Manifest], split: str) -> RowGroups:
    """Every row group of a split, in file order, from the manifests alone."""
    return RowGroups.of(
        RowGroup(dataset, shard_index, group_index, group.rows)
        for dataset, manifest in enumerate(manifests)
        for shard_index, shard in enumerate(manifest.split(split))
        for group_index, group in enumerate(shard.row_groups)
    )
