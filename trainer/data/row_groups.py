"""Row groups of shard directories: addresses of rows, and the permutation that shuffles them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.schemas.manifest import Manifest

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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

    Sorts the indices by a 64-bit mix of index and seed (the finalizer of SplitMix64: Steele, Lea,
    Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(1, size + 1, dtype=np.uint64) * GOLDEN) ^ np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


def list_row_groups(manifests: Sequence[Manifest], split: str) -> RowGroups:
    """Every row group of a split, in file order, from the manifests alone."""
    return RowGroups.of(
        RowGroup(dataset, shard_index, group_index, group.rows)
        for dataset, manifest in enumerate(manifests)
        for shard_index, shard in enumerate(manifest.split(split))
        for group_index, group in enumerate(shard.row_groups)
    )
