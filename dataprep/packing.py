"""Documents of one block to training rows of at most `sequence_len` tokens."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.dataprep.best_fit import best_fit_rows
from headrace.dataprep.tokenizer import Ids
from headrace.schemas.prepare_config import Packing


def pack_documents(
    documents: list[Ids], packing: Packing, sequence_len: int
) -> tuple[pa.ListArray, pa.ListArray]:
    """Rows of documents.

    Args:
        documents: ids of each document, at least one document, each of at least one token, and of
            at most `sequence_len` unless they are concatenated.

    Returns:
        `input_ids` and `document_lengths` of the rows; lengths are those of the pieces in each row.
    """
    lengths = np.array([len(ids) for ids in documents])
    match packing:
        case "concatenate":
            return pack_concatenated(documents, lengths, sequence_len)
        case "best_fit":
            return pack_whole(documents, lengths, best_fit_rows(lengths, sequence_len))
        case "none":
            return pack_whole(documents, lengths, np.arange(len(documents)))


def pack_concatenated(
    documents: list[Ids], lengths: npt.NDArray[np.int64], sequence_len: int
) -> tuple[pa.ListArray, pa.ListArray]:
    """Put documents one after another, and cut every `sequence_len` tokens."""
    ids = np.concatenate(documents)
    row_starts = np.arange(0, len(ids), sequence_len)
    piece_starts = np.union1d(row_starts, np.cumsum(lengths) - lengths)
    piece_lengths = np.diff(piece_starts, append=len(ids))
    first_pieces = np.searchsorted(piece_starts, row_starts)
    return (
        list_array(ids, np.append(row_starts, len(ids))),
        list_array(piece_lengths, np.append(first_pieces, len(piece_lengths))),
    )


def pack_whole(
    documents: list[Ids], lengths: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[pa.ListArray, pa.ListArray]:
    """Put each document into its row, 0 to n - 1; in a row they keep their order."""
    order = np.argsort(rows, kind="stable")
    ids = np.concatenate([documents[index] for index in order])
    ends = np.cumsum(np.bincount(rows))  # of rows, in documents
    token_ends = np.cumsum(lengths[order])[ends - 1]
    return (
        list_array(ids, np.append(0, token_ends)),
        list_array(lengths[order], np.append(0, ends)),
    )


def list_array(values: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer]) -> pa.ListArray:
    """Arrow lists of int32 over one flat array: list i is values[offsets[i]:offsets[i + 1]]."""
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values.astype(np.int32, copy=False))
    )
