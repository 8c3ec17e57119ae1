"""What must hold for the rows of every row group, whoever wrote and whoever reads them."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.schemas.manifest import Manifest


def problems_in_rows(rows: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Ids outside of the vocabulary, and lists whose lengths do not fit together."""
    ids = pc.list_flatten(rows["input_ids"]).to_numpy()
    size = manifest.tokenizer.vocabulary_size
    if len(ids) and not (ids.min() >= 0 and ids.max() < size):
        yield f"ids from {ids.min()} to {ids.max()}, the tokenizer has {size}"
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    if not np.all((lengths >= 1) & (lengths <= manifest.sequence_len)):
        yield f"rows of {lengths.min()} to {lengths.max()} tokens, not 1 to {manifest.sequence_len}"
    pieces = pc.list_flatten(rows["document_lengths"]).to_numpy()
    owners = pc.list_parent_indices(rows["document_lengths"]).to_numpy()
    sums = np.bincount(owners, weights=pieces, minlength=rows.num_rows)
    if np.any(pieces < 1) or not np.array_equal(sums, lengths):
        yield "document_lengths do not sum to the rows' lengths"
    masked = rows.filter(pc.is_valid(rows["loss_mask"]))
    marks = pc.list_value_length(masked["loss_mask"]).to_numpy()
    if not np.array_equal(marks, pc.list_value_length(masked["input_ids"]).to_numpy()):
        yield "loss_mask is not as long as input_ids"
