"""Reads row groups of shards. Only the first stage of a pipeline group may use it."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrace.schemas.manifest import Manifest
from headrace.schemas.train_config import LoaderConfig
from headrace.trainer.quarantine import Quarantine
from headrace.trainer.row_group_source import RowGroupSource
from headrace.trainer.row_order import RowAddress, RowGroup


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
        directories: Sequence[Path | str],
        manifests: Sequence[Manifest],
        split: str,
        held_row_groups: int,
        apart: bool = False,
        config: LoaderConfig | None = None,
    ) -> None:
        config = config or LoaderConfig()
        source = RowGroupSource(directories, manifests, split, config)
        self.quarantine = Quarantine(source, allowed=config.on_corrupt == "quarantine")
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
        return self.quarantine.read(row_group)


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
