"""Reads row groups of shards. Only the first stage of a pipeline group may use it."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.schemas.errors import DataError
from headrace.schemas.manifest import Manifest
from headrace.trainer.row_order import RowAddress, RowGroup

READ_COLUMNS = ["input_ids", "loss_mask", "document_lengths", "source", "row_key"]


@dataclass(frozen=True)
class Row:
    """One training row.

    `input_ids` [tokens] int32; `loss_mask` [tokens] bool; `document_lengths` sum to tokens;
    `source` is the dataset's name; `row_key` its stable identity.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    document_lengths: NDArray[np.int32]
    source: str
    row_key: int


class ShardReader:
    """Random access to the rows of one split of several shard directories.

    Args:
        held_row_groups: decoded row groups kept in memory, least recently used dropped first.
        apart: that many for each dataset. A shared limit would drop those of a dataset that is
            seldom read whenever another one moves on.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        manifests: Sequence[Manifest],
        split: str,
        held_row_groups: int,
        apart: bool = False,
    ) -> None:
        self.paths = [
            [directory / shard.file for shard in manifest.split(split)]
            for directory, manifest in zip(directories, manifests, strict=True)
        ]
        self.held_row_groups = held_row_groups
        self.apart = apart
        self._held: defaultdict[int, OrderedDict[RowGroup, pa.Table]] = defaultdict(OrderedDict)

    def row(self, address: RowAddress) -> Row:
        """Decode one row."""
        table = self._row_group(address.row_group)
        index = address.row
        ids = _list_values(table, "input_ids", index)
        mask = _list_values(table, "loss_mask", index)
        return Row(
            input_ids=ids,
            loss_mask=np.ones(len(ids), dtype=np.bool_) if mask is None else mask,
            document_lengths=_list_values(table, "document_lengths", index),
            source=table.column("source")[index].as_py(),
            row_key=table.column("row_key")[index].as_py(),
        )

    def _row_group(self, row_group: RowGroup) -> pa.Table:
        held = self._held[row_group.dataset if self.apart else 0]
        if row_group in held:
            held.move_to_end(row_group)
            return held[row_group]
        table = self._read(row_group)
        while len(held) >= self.held_row_groups:
            held.popitem(last=False)
        held[row_group] = table
        return table

    def _read(self, row_group: RowGroup) -> pa.Table:
        path = self.paths[row_group.dataset][row_group.shard]
        try:
            with path.open("rb") as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                table = parquet.read_row_group(row_group.group, columns=READ_COLUMNS)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: row group {row_group.group} cannot be read ({error}); "
                f"run `headrace verify {path.parent}`"
            ) from None
        if table.num_rows != row_group.rows:
            raise DataError(
                f"{path}: row group {row_group.group} has {table.num_rows} rows, the manifest says "
                f"{row_group.rows}; run `headrace verify {path.parent}`"
            )
        return table.combine_chunks()


def list_row_groups(manifests: Sequence[Manifest], split: str) -> list[RowGroup]:
    """Every row group of a split, in file order, from the manifests alone."""
    return [
        RowGroup(dataset, shard_index, group_index, group.rows)
        for dataset, manifest in enumerate(manifests)
        for shard_index, shard in enumerate(manifest.split(split))
        for group_index, group in enumerate(shard.row_groups)
    ]


def _list_values(table: pa.Table, column: str, index: int) -> Any:
    """The values of one list cell as a numpy array, or None for null."""
    values = table.column(column)[index].values
    return None if values is None else values.to_numpy(zero_copy_only=False)
