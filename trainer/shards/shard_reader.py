"""Reads row groups of shards. Only the first stage of a pipeline group may use it."""

from collections import OrderedDict, defaultdict
from typing import Generic, TypeVar

from headrace.trainer.shards.decoded_rows import Decoded
from headrace.trainer.shards.quarantine import Quarantine
from headrace.trainer.shards.row_group_source import RowGroupSource
from headrace.trainer.shards.row_groups import RowAddress, RowGroup
from headrace.trainer.shards.row_source import RowSource

T = TypeVar("T")


class ShardReader(Generic[T]):
    """Random access to the rows of one split of several shard directories.

    Args:
        decode: a table of its columns to what is kept of a row group.
    """

    def __init__(self, decode: type[Decoded[T]], rows: RowSource) -> None:
        self.decode = decode
        self.row_groups_read = 0
        self.bytes_read = 0  # as the manifest gives them
        self.source = RowGroupSource(
            rows.directories, rows.manifests, rows.split, rows.loader, decode.COLUMNS
        )
        self.quarantine = Quarantine(self.source, allowed=rows.replaces_damaged)
        self.held_row_groups = rows.held_row_groups
        self.apart = rows.apart
        self._held: defaultdict[int, OrderedDict[RowGroup, Decoded[T]]] = defaultdict(OrderedDict)

    def row(self, address: RowAddress) -> T:
        """One row."""
        rows, number = self.locate(address)
        return rows.row(number)

    def locate(self, address: RowAddress) -> tuple[Decoded[T], int]:
        """The row's decoded row group, and its place in there."""
        return self._row_group(address.row_group), address.row

    def _row_group(self, row_group: RowGroup) -> Decoded[T]:
        held = self._held[row_group.dataset if self.apart else 0]
        if row_group in held:
            held.move_to_end(row_group)
            return held[row_group]
        rows = self._read(row_group)
        while len(held) >= self.held_row_groups:
            held.popitem(last=False)
        held[row_group] = rows
        return rows

    def _read(self, row_group: RowGroup) -> Decoded[T]:
        table = self.quarantine.read(row_group)
        record = self.source.files[row_group.dataset][row_group.shard].record
        self.row_groups_read += 1
        self.bytes_read += record.row_groups[row_group.group].bytes
        return self.decode(table)
