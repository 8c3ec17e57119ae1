"""The rows of one decoded row group, as views of its Arrow memory."""

from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrace.schemas.shards.arrow_numbers import bools_of, numbers_of, one_chunk
from headrace.trainer.shards.packed_rows import PackedRow
from headrace.trainer.vision.tile import Tile


class Row(NamedTuple):
    """One training row.

    `input_ids` [tokens] uint16 or int32; `loss_mask` [tokens] bool, None when every token is
    trained; `document_lengths` sum to tokens; `source` is the dataset's name; `row_key` its stable
    identity; `control_class` -1, 0 or 1, None where its source has none; `desirable` the label of a
    single answer, None of other rows; `images` its pictures' tiles in the order of their tokens.
    """

    input_ids: NDArray[np.integer[Any]]
    loss_mask: NDArray[np.bool_] | None
    document_lengths: NDArray[np.int32]
    source: str
    row_key: int
    control_class: int | None = None
    desirable: bool | None = None
    images: tuple[Tile, ...] = ()


RowT = TypeVar("RowT", covariant=True)


class Decoded(Protocol[RowT]):
    """Decoded columns of a row group: its rows by number, and the tokens of each."""

    COLUMNS: ClassVar[list[str]]
    lengths: list[int]

    def __init__(self, table: pa.Table) -> None: ...

    def row(self, index: int) -> RowT:
        """One row."""


class ListColumn:
    """A column of lists as one flat array and where each list begins in it; copies nothing."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = one_chunk(column)
        self.values = array.values
        self.offsets: NDArray[np.int32] = numbers_of(array.offsets)
        self.all_null = array.null_count == len(array)
        self.valid = bools_of(array.is_valid()) if array.null_count else None

    def flat(self) -> NDArray[Any]:
        """Return all values of a column of numbers."""
        return numbers_of(self.values)

    def sums(self) -> NDArray[np.int32]:
        """The sum of all values before each list, and of all."""
        ends = np.cumsum(self.flat(), dtype=np.int32)
        return np.append(np.int32(0), ends)[self.offsets]

    def bits(self, index: int) -> NDArray[np.bool_] | None:
        """One list of booleans, unpacked; None for null."""
        if self.all_null or (self.valid is not None and not self.valid[index]):
            return None
        start, stop = self.offsets[index : index + 2].tolist()
        return bools_of(self.values.slice(start, stop - start))


def names_of(column: pa.ChunkedArray) -> list[str]:
    """A column of a few different strings; each is made once."""
    array = pa.concat_arrays(column.chunks).dictionary_encode()
    names = array.dictionary.to_pylist()
    return [names[index] for index in numbers_of(array.indices).tolist()]


def control_classes(table: pa.Table) -> list[int | None] | None:
    """The control class of each row; None where no row has one, as in foreign files."""
    if "control_class" not in table.column_names:
        return None
    column = table["control_class"]
    return None if column.null_count == len(column) else column.to_pylist()


class ImageColumn:
    """The pictures of each row; none of a table without the column."""

    def __init__(self, table: pa.Table) -> None:
        there = "images" in table.column_names
        self.rows = one_chunk(table["images"]) if there else None

    def tiles(self, index: int) -> tuple[Tile, ...]:
        """Return one row's tiles."""
        if self.rows is None:
            return ()
        return tuple(Tile(**tile) for tile in self.rows[index].as_py() or ())


class DecodedRows:
    """Rows by their place in the group; 2 bytes a token are held, 4 where ids are large or foreign.

    Args:
        table: the columns that make a `Row`, at least one row.
    """

    COLUMNS: ClassVar[list[str]] = [
        "input_ids",
        "loss_mask",
        "document_lengths",
        "source",
        "row_key",
        "control_class",
        "images",
    ]

    def __init__(self, table: pa.Table) -> None:
        ids, documents = ListColumn(table["input_ids"]), ListColumn(table["document_lengths"])
        self._ids, self._ends = ids.flat(), ids.offsets.tolist()
        self._documents, self._document_ends = documents.flat(), documents.offsets.tolist()
        self._mask = ListColumn(table["loss_mask"])
        self._sources: list[str] = names_of(table["source"])
        self._keys: list[int] = numbers_of(table["row_key"]).tolist()
        self._classes = control_classes(table)
        self._images = ImageColumn(table)
        self.lengths: list[int] = np.diff(ids.offsets).tolist()  # tokens of each row

    def row(self, index: int) -> Row:
        """One row; its arrays keep the whole group in memory."""
        return Row(
            self._ids[self._ends[index] : self._ends[index + 1]],
            self._mask.bits(index),
            self._documents[self._document_ends[index] : self._document_ends[index + 1]],
            self._sources[index],
            self._keys[index],
            None if self._classes is None else self._classes[index],
            images=self._images.tiles(index),
        )


class RowFacts:
    """`DecodedRows` without the tokens, for a look at lengths and names alone."""

    COLUMNS: ClassVar[list[str]] = ["document_lengths", "source", "row_key"]

    def __init__(self, table: pa.Table) -> None:
        ends = ListColumn(table["document_lengths"]).sums()
        self.lengths: list[int] = np.diff(ends).tolist()
        self._sources: list[str] = names_of(table["source"])
        self._keys: list[int] = numbers_of(table["row_key"]).tolist()

    def row(self, index: int) -> PackedRow:
        """One row."""
        return PackedRow(self._sources[index], self._keys[index], self.lengths[index])
