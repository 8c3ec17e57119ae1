"""Checks that the rows of every row group must pass, whoever wrote and whoever reads them."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.schemas.arrow_numbers import numbers_of
from headrace.schemas.manifest import Manifest
from headrace.schemas.shard_format import SIDES


def problems_in_rows(rows: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Ids outside of the vocabulary, and lists whose lengths do not fit together."""
    for ids, mask in SIDES:
        if ids in rows.column_names:
            yield from problems_of_side(rows[ids], rows[mask], manifest)
    lengths = numbers_of(pc.list_value_length(rows["input_ids"]))
    pieces = numbers_of(pc.list_flatten(rows["document_lengths"]))
    owners = numbers_of(pc.list_parent_indices(rows["document_lengths"]))
    sums = np.bincount(owners, weights=pieces, minlength=rows.num_rows)
    if np.any(pieces < 1) or not np.array_equal(sums, lengths):
        yield "document_lengths do not sum to the rows' lengths"


def problems_of_side(
    ids: pa.ChunkedArray, mask: pa.ChunkedArray, manifest: Manifest
) -> Iterator[str]:
    """The ids and masks of some rows; preference sets have two sides."""
    if ids.null_count:
        yield f"{ids.null_count} rows have no ids on one side"
        return
    values = numbers_of(pc.list_flatten(ids))
    size = manifest.tokenizer.vocabulary_size
    if len(values) and not (values.min() >= 0 and values.max() < size):
        yield f"ids from {values.min()} to {values.max()}, the tokenizer has {size}"
    lengths = numbers_of(pc.list_value_length(ids))
    if not np.all((lengths >= 1) & (lengths <= manifest.sequence_len)):
        yield f"rows of {lengths.min()} to {lengths.max()} tokens, not 1 to {manifest.sequence_len}"
    masked = pc.is_valid(mask)
    marks = numbers_of(pc.list_value_length(mask.filter(masked)))
    if not np.array_equal(marks, numbers_of(pc.list_value_length(ids.filter(masked)))):
        yield "loss_mask is not as long as input_ids"
