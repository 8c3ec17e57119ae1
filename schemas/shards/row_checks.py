"""Checks that hold for the rows of every row group, whoever wrote and whoever reads them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from headrace.schemas.shards.arrow_numbers import numbers_of, one_chunk
from headrace.schemas.shards.image_column import problems_of_images
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import IMAGES, SIDES

CONTROL_CLASSES = (-1, 1)
NULLABLE = ("loss_mask", "rejected_loss_mask", "control_class", IMAGES)


def problems_in_rows(rows: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the columns that there are, each naming column and row.

    Rows are counted from the first of the table. What would make later checks fail comes first, so
    that a caller may stop at the first problem.
    """
    found = list(nulls(rows))
    yield from found
    if found:
        return
    if "document_lengths" in rows.column_names:
        yield from problems_of_documents(rows, manifest)
    for ids, mask in SIDES:
        if ids in rows.column_names:
            yield from problems_of_side(rows, ids, mask, manifest)
    yield from problems_of_classes(rows)
    if manifest.images is not None and IMAGES in rows.column_names:
        yield from problems_of_images(rows, manifest.images.placeholder_id)


def at(column: str, row: int) -> str:
    """Return how a place is named in messages."""
    return f"column {column}, row {row}"


def nulls(rows: pa.Table) -> Iterator[str]:
    """Yield columns with nulls where the format has none."""
    for name in rows.column_names:
        column = one_chunk(rows[name])
        nullable = name in NULLABLE
        if column.null_count and not nullable:
            yield f"{at(name, pc.index(column.is_null(), True).as_py())}: null"
        if pa.types.is_list(column.type) and (values := column.flatten()).null_count:
            place = pc.index(values.is_null(), True).as_py()
            owner = pc.list_parent_indices(column)[place].as_py()
            yield f"{at(name, owner)}: a null among its values"
        if pa.types.is_dictionary(column.type) and column.dictionary.null_count:
            yield f"column {name}: a null among its values"


def problems_of_documents(rows: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Yield lengths of documents that are below 1, or do not sum to their row's."""
    column = rows["document_lengths"]
    pieces = numbers_of(pc.list_flatten(column))
    owners = numbers_of(pc.list_parent_indices(column))
    if len(pieces) and pieces.min() < 1:
        place = int(np.argmax(pieces < 1))
        yield f"{at('document_lengths', owners[place])}: a document of {pieces[place]} tokens"
        return
    # float64 is exact up to 2^53, far above the length of any row
    sums = np.bincount(owners, weights=pieces, minlength=rows.num_rows)
    limit = manifest.sequence_len
    if "input_ids" not in rows.column_names:
        if len(sums) and not (sums.min() >= 1 and sums.max() <= limit):
            row = int(np.argmax((sums < 1) | (sums > limit)))
            yield f"{at('document_lengths', row)}: {int(sums[row])} tokens, not 1 to {limit}"
        return
    lengths = numbers_of(pc.list_value_length(rows["input_ids"]))
    if not np.array_equal(sums, lengths):
        row = int(np.argmax(sums != lengths))
        yield (
            f"{at('document_lengths', row)}: document_lengths do not sum to the rows' lengths: "
            f"{int(sums[row])}, not {lengths[row]}"
        )


def problems_of_side(
    rows: pa.Table, ids_name: str, mask_name: str, manifest: Manifest
) -> Iterator[str]:
    """Yield ids outside of the vocabulary, rows of a wrong length, and masks of another one."""
    ids = rows[ids_name]
    values = numbers_of(pc.list_flatten(ids))
    size = manifest.tokenizer.vocabulary_size
    if len(values) and not (values.min() >= 0 and values.max() < size):
        place = int(np.argmax((values < 0) | (values >= size)))
        row = pc.list_parent_indices(ids)[place].as_py()
        yield (
            f"{at(ids_name, row)}: id {values[place]}; "
            f"ids from {values.min()} to {values.max()}, the tokenizer has {size}"
        )
    lengths, limit = numbers_of(pc.list_value_length(ids)), manifest.sequence_len
    wrong = (lengths < 1) | (lengths > limit)
    if wrong.any():
        yield (
            f"{at(ids_name, int(np.argmax(wrong)))}: "
            f"rows of {lengths.min()} to {lengths.max()} tokens, not 1 to {limit}"
        )
    if mask_name in rows.column_names:
        yield from problems_of_mask(rows[mask_name], mask_name, ids_name, lengths)


def problems_of_mask(
    mask: pa.ChunkedArray, mask_name: str, ids_name: str, lengths: NDArray[Any]
) -> Iterator[str]:
    """Yield masks that are not as long as their ids; rows without one are trained in whole."""
    if mask.null_count == len(mask):
        return
    marks = numbers_of(pc.fill_null(pc.list_value_length(mask), -1))
    wrong = (marks != lengths) & (marks >= 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        yield (
            f"{at(mask_name, row)}: {mask_name} is not as long as {ids_name}: {marks[row]}, "
            f"not {lengths[row]}"
        )


def problems_of_classes(rows: pa.Table) -> Iterator[str]:
    """Yield control classes that there are not."""
    if "control_class" not in rows.column_names:
        return
    column = rows["control_class"]
    if column.null_count == len(column):
        return
    low, high = CONTROL_CLASSES
    values = numbers_of(pc.fill_null(column, 0))
    wrong = (values < low) | (values > high)
    if wrong.any():
        row = int(np.argmax(wrong))
        yield f"{at('control_class', row)}: {values[row]}, not -1, 0 or 1"
