"""Documents of one block to training rows of at most `sequence_len` tokens."""

import numpy as np
import pyarrow as pa

from headrace.dataprep.tokenizer import Ids


def pack_concatenated(documents: list[Ids], sequence_len: int) -> tuple[pa.ListArray, pa.ListArray]:
    """Put documents one after another and cut every `sequence_len` tokens; the last row is shorter.

    Args:
        documents: ids of each document, each of at least one token.

    Returns:
        `input_ids` and `document_lengths` of the rows; lengths are those of the pieces in each row.
    """
    ids = np.concatenate(documents)
    row_starts = np.arange(0, len(ids), sequence_len)
    document_starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    piece_starts = np.union1d(row_starts, document_starts)
    piece_lengths = np.diff(piece_starts, append=len(ids)).astype(np.int32)
    first_pieces = np.searchsorted(piece_starts, row_starts)
    return (
        list_array(ids, np.append(row_starts, len(ids))),
        list_array(piece_lengths, np.append(first_pieces, len(piece_lengths))),
    )


def list_array(values: Ids, offsets: np.ndarray) -> pa.ListArray:
    """Arrow lists over one flat int32 array: list i is values[offsets[i]:offsets[i + 1]]."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
