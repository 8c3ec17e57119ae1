"""Parquet that something else wrote: which of its columns mean what, and its rows as ours."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.keyed_hash import FACTORS, shift_right, spread

IGNORED_LABEL = -100  # of Hugging Face and jllm: a token without a loss

Flags = NDArray[np.bool_]
Offsets = NDArray[np.int64]


class ForeignColumns(BaseModel):
    """Names of columns. Without `labels` and `loss_mask` every token is trained.

    Documents of a row come from one of `document_lengths`, `cu_seqlens` (their starts, then the
    end, which may lie one before the row's) and `position_ids` (0 at each start); without any, a
    row is one document. Padding, where `attention_mask` is 0 or `padding_id` stands, is cut off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_ids: str = "input_ids"
    labels: str | None = None
    loss_mask: str | None = None
    attention_mask: str | None = None
    padding_id: int | None = None
    document_lengths: str | None = None
    cu_seqlens: str | None = None
    position_ids: str | None = None
    source: str | None = None
    row_key: str | None = None

    def names(self) -> list[str]:
        """The columns to read."""
        values = self.model_dump(exclude={"padding_id"}).values()
        return [name for name in values if name is not None]


def as_shard_table(
    table: pa.Table, columns: ForeignColumns, source: str, key_seed: int, first_row: int
) -> pa.Table:
    """Rows of a foreign table in the columns that a loader reads.

    Args:
        source: name of the source of rows that do not tell theirs.
        key_seed, first_row: what rows without a key get one from; unique to the file, and the place
            of the first row in it.

    Raises:
        ValueError: rows that the shard format cannot hold, with the number of the first.
    """
    table = table.combine_chunks()
    ids, offsets = flat(table, columns.input_ids)
    kept = kept_tokens(table, columns, ids, offsets)
    mask = loss_mask(table, columns, ids, offsets)
    documents = documents_of(table, columns, offsets)
    starts = document_starts(offsets, documents, len(ids))
    new_offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
    lengths, lengths_offsets = lengths_between(starts[kept], new_offsets)
    return pa.table(
        {
            "input_ids": as_lists(checked_ids(ids[kept], new_offsets), new_offsets, pa.int32()),
            "loss_mask": (
                pa.nulls(table.num_rows, pa.list_(pa.bool_()))
                if mask is None
                else as_lists(mask[kept], new_offsets, pa.bool_())
            ),
            "document_lengths": as_lists(lengths, lengths_offsets, pa.int32()),
            "source": sources(table, columns, source),
            "row_key": row_keys(table, columns, key_seed, first_row),
        }
    )


def flat(table: pa.Table, name: str) -> tuple[NDArray[Any], Offsets]:
    """Return all values of a list column one after another, and the bounds of the rows in them."""
    if name not in table.column_names:
        raise ValueError(f"column {name} is missing")
    column = table.column(name)
    lists = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if lists.null_count:
        raise ValueError(f"row {pc.index(lists.is_null(), True).as_py()}: {name} is null")
    if lists.flatten().null_count:
        place = pc.index(lists.flatten().is_null(), True).as_py()
        row = pc.list_parent_indices(lists)[place].as_py()
        raise ValueError(f"row {row}: {name} holds a null")
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values, np.concatenate([[0], np.cumsum(lengths)])


def same_shape(table: pa.Table, name: str, offsets: Offsets) -> NDArray[Any]:
    """The values of a list column that must be as long as the ids, row by row."""
    values, own = flat(table, name)
    if not np.array_equal(own, offsets):
        row = int(np.flatnonzero(np.diff(own) != np.diff(offsets))[0])
        raise ValueError(f"row {row}: {name} is not as long as the ids")
    return values


def row_of(offsets: Offsets, token: int) -> int:
    """The row that holds a token."""
    return int(np.searchsorted(offsets, token, side="right")) - 1


def kept_tokens(
    table: pa.Table, columns: ForeignColumns, ids: NDArray[Any], offsets: Offsets
) -> Flags:
    """True where a token is none of the padding."""
    kept = np.ones(len(ids), dtype=np.bool_)
    if columns.attention_mask is not None:
        kept = same_shape(table, columns.attention_mask, offsets).astype(np.bool_)
        first = np.zeros(len(ids), dtype=np.bool_)
        first[offsets[:-1][np.diff(offsets) > 0]] = True
        rises = np.flatnonzero(kept & (first | ~np.concatenate([[False], kept[:-1]])))
        rows = np.searchsorted(offsets, rises, side="right") - 1
        twice = rows[1:][rows[1:] == rows[:-1]]
        if len(twice):
            raise ValueError(f"row {twice[0]}: {columns.attention_mask} has a hole in the middle")
    if columns.padding_id is not None:
        real = np.flatnonzero(ids != columns.padding_id)
        last = np.concatenate([[-1], real])[np.searchsorted(real, offsets[1:])]
        kept &= np.arange(len(ids)) <= np.repeat(last, np.diff(offsets))
    return kept


def loss_mask(
    table: pa.Table, columns: ForeignColumns, ids: NDArray[Any], offsets: Offsets
) -> Flags | None:
    """True where a token is trained; None: everywhere."""
    if columns.loss_mask is not None:
        return nullable_mask(table, columns.loss_mask, offsets)
    if columns.labels is None:
        return None
    labels = same_shape(table, columns.labels, offsets)
    trained: Flags = labels != IGNORED_LABEL
    other = np.flatnonzero(trained & (labels != ids))
    if len(other):
        raise ValueError(
            f"row {row_of(offsets, int(other[0]))}: a label is neither its token nor "
            f"{IGNORED_LABEL}; labels must not be shifted"
        )
    return trained


def nullable_mask(table: pa.Table, name: str, offsets: Offsets) -> Flags | None:
    """The values of a mask; a row without one is trained in whole, and None means all are."""
    column = table.column(name)
    if column.null_count == table.num_rows:
        return None
    has_one = column.is_valid().to_numpy()
    lengths = np.diff(offsets)
    values, own = flat(table.filter(pa.array(has_one)).combine_chunks(), name)
    if not np.array_equal(np.diff(own), lengths[has_one]):
        row = int(np.flatnonzero(has_one)[np.diff(own) != lengths[has_one]][0])
        raise ValueError(f"row {row}: {name} is not as long as the ids")
    mask = np.ones(offsets[-1], dtype=np.bool_)
    mask[np.repeat(has_one, lengths)] = values.astype(np.bool_)
    return mask


def documents_of(table: pa.Table, columns: ForeignColumns, offsets: Offsets) -> Offsets:
    """Places, in all tokens, at which documents start; starts of rows may be left out."""
    if columns.document_lengths is not None:
        lengths, own = flat(table, columns.document_lengths)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        if not np.array_equal(ends[own], offsets):
            row = int(np.flatnonzero(np.diff(ends[own]) != np.diff(offsets))[0])
            raise ValueError(f"row {row}: {columns.document_lengths} do not sum to its length")
        return ends[:-1].astype(np.int64)
    if columns.cu_seqlens is not None:
        values, own = flat(table, columns.cu_seqlens)
        is_end = np.zeros(len(values), dtype=np.bool_)
        is_end[own[1:][np.diff(own) > 0] - 1] = True
        rows = np.repeat(np.arange(len(own) - 1), np.diff(own))
        wrong = (values < 0) | (values > np.diff(offsets)[rows])
        if wrong.any():
            row = rows[np.flatnonzero(wrong)[0]]
            raise ValueError(f"row {row}: {columns.cu_seqlens} points outside of it")
        starts: Offsets = (values.astype(np.int64) + offsets[rows])[~is_end]
        return starts
    if columns.position_ids is not None:
        return np.flatnonzero(same_shape(table, columns.position_ids, offsets) == 0)
    return np.zeros(0, dtype=np.int64)


def document_starts(offsets: Offsets, documents: Offsets, tokens: int) -> Flags:
    """True at the first token of each document, that of each row among them."""
    starts = np.zeros(tokens + 1, dtype=np.bool_)
    starts[documents] = True
    starts[offsets[:-1]] = True
    return starts[:tokens]


def lengths_between(starts: Flags, offsets: Offsets) -> tuple[Offsets, Offsets]:
    """Lengths of documents, and where each row's begin among them.

    A row whose first token was cut off as padding starts a document all the same.
    """
    starts = starts.copy()
    starts[offsets[:-1][np.diff(offsets) > 0]] = True
    places = np.flatnonzero(starts)
    lengths = np.diff(np.concatenate([places, [len(starts)]]))
    return lengths, np.searchsorted(places, offsets)


def checked_ids(ids: NDArray[Any], offsets: Offsets) -> NDArray[Any]:
    """Return ids that fit into 32 bits.

    Raises:
        ValueError: one does not, or is negative; with its row.
    """
    if len(ids) and not (ids.min() >= 0 and ids.max() < 1 << 31):
        place = int(np.argmax((ids < 0) | (ids >= 1 << 31)))
        raise ValueError(f"row {row_of(offsets, place)}: id {ids[place]} cannot be one")
    return ids


def as_lists(values: NDArray[Any], offsets: Offsets, kind: pa.DataType) -> pa.Array:
    """A list column; ids that do not fit are an error."""
    flat_values = pa.array(values).cast(kind)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat_values)


def sources(table: pa.Table, columns: ForeignColumns, source: str) -> pa.Array:
    """The source of each row."""
    if columns.source is None:
        return pa.array([source] * table.num_rows, pa.string()).dictionary_encode()
    found = table.column(columns.source)
    if pa.types.is_dictionary(found.type):  # each text once: not unpacked
        return found.cast(pa.dictionary(pa.int32(), pa.string()))
    return pc.cast(found, pa.string()).combine_chunks().dictionary_encode()


def row_keys(
    table: pa.Table, columns: ForeignColumns, key_seed: int, first_row: int
) -> pa.Array | pa.ChunkedArray:
    """The key of each row: its own, or one from its place in the file."""
    if columns.row_key is not None:
        return table.column(columns.row_key).cast(pa.uint64())
    places = np.arange(first_row, first_row + table.num_rows, dtype=np.uint64)
    mixed = spread(places, key_seed)
    with np.errstate(over="ignore"):  # not `mix_numbers`: keys must stay those of earlier indexes
        mixed = (mixed ^ shift_right(mixed, 30)) * np.uint64(FACTORS[0])
    return pa.array(mixed ^ shift_right(mixed, 31), pa.uint64())


def key_seed_of(sha256: str) -> int:
    """Return the seed of the keys of a file's rows, derived from the file's content."""
    return derive_seed(0, "foreign rows", sha256)
