"""Samples of one block to training rows of at most `sequence_len` tokens."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.dataprep.rows.best_fit import best_fit_rows
from headrace.dataprep.rows.picture_rows import images_array
from headrace.dataprep.text.sample import Mask, Sample
from headrace.schemas.prepare.prepare_config import Packing
from headrace.schemas.shards.arrow_numbers import as_arrow

Numbers = npt.NDArray[np.integer]


class PackedRows(NamedTuple):
    """Columns of the rows. `document_lengths` are those of the pieces in each row."""

    input_ids: pa.ListArray
    loss_mask: pa.ListArray
    document_lengths: pa.ListArray
    rejected_input_ids: pa.ListArray | None = None  # of pairs
    rejected_loss_mask: pa.ListArray | None = None
    desirable: pa.BooleanArray | None = None  # of answers with a label
    images: pa.ListArray | None = None  # where a row has some


def pack_samples(samples: list[Sample], packing: Packing, sequence_len: int) -> PackedRows:
    """Rows of samples.

    Args:
        samples: at least one, and each of at most `sequence_len` tokens unless they are
            concatenated.
    """
    lengths = np.array([len(sample.ids) for sample in samples])
    if samples[0].rejected_ids is not None:
        return pack_pairs(samples, lengths)
    if samples[0].desirable is not None:
        labels = pa.array([sample.desirable for sample in samples], pa.bool_())
        return pack_whole(samples, lengths, np.arange(len(samples)))._replace(desirable=labels)
    match packing:
        case "concatenate":
            return pack_concatenated(samples, lengths, sequence_len)
        case "best_fit":
            return pack_whole(samples, lengths, best_fit_rows(lengths, sequence_len))
        case "none":
            return pack_whole(samples, lengths, np.arange(len(samples)))


def pack_concatenated(
    samples: list[Sample], lengths: npt.NDArray[np.int64], sequence_len: int
) -> PackedRows:
    """Put samples one after another, and cut every `sequence_len` tokens."""
    ids = np.concatenate([sample.ids for sample in samples])
    row_starts = np.arange(0, len(ids), sequence_len)
    piece_starts = np.union1d(row_starts, np.cumsum(lengths) - lengths)
    piece_lengths = np.diff(piece_starts, append=len(ids))
    first_pieces = np.searchsorted(piece_starts, row_starts)
    offsets = np.append(row_starts, len(ids))
    return PackedRows(
        list_array(ids, offsets),
        mask_array(samples, offsets),
        list_array(piece_lengths, np.append(first_pieces, len(piece_lengths))),
    )


def pack_whole(
    samples: list[Sample], lengths: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> PackedRows:
    """Put each sample into its row, 0 to n - 1; in a row they keep their order."""
    order = np.argsort(rows, kind="stable")
    ordered = [samples[index] for index in order]
    ids = np.concatenate([sample.ids for sample in ordered])
    ends = np.cumsum(np.bincount(rows))  # of rows, in samples
    offsets = np.append(0, np.cumsum(lengths[order])[ends - 1])
    return PackedRows(
        list_array(ids, offsets),
        mask_array(ordered, offsets),
        list_array(lengths[order], np.append(0, ends)),
        images=images_array(ordered, ends.tolist()) if any(s.pictures for s in samples) else None,
    )


def pack_pairs(samples: list[Sample], lengths: npt.NDArray[np.int64]) -> PackedRows:
    """Each pair as a row."""
    chosen = pack_whole(samples, lengths, np.arange(len(samples)))
    other = [sample.other_side()._replace(pictures=()) for sample in samples]
    rejected = pack_samples(other, "none", 0)
    return chosen._replace(
        rejected_input_ids=rejected.input_ids, rejected_loss_mask=rejected.loss_mask
    )


def list_array(values: Numbers, offsets: Numbers) -> pa.ListArray:
    """Arrow lists of int32 over one flat array: list i is values[offsets[i]:offsets[i + 1]]."""
    return pa.ListArray.from_arrays(
        as_arrow(offsets.astype(np.int32)), as_arrow(values.astype(np.int32, copy=False))
    )


def mask_array(samples: list[Sample], offsets: Numbers) -> pa.ListArray:
    """The loss mask of each row; null where every token is trained.

    Args:
        samples: in the order of their tokens in the rows.
        offsets: where rows begin among those tokens, and where the last one ends.
    """
    kind = pa.list_(pa.bool_())
    if all(sample.trained is None for sample in samples):
        return pa.nulls(len(offsets) - 1, kind)
    trained = np.concatenate([full_mask(sample) for sample in samples])
    whole = np.logical_and.reduceat(trained, offsets[:-1])
    lengths = np.diff(offsets)
    kept = trained[np.repeat(~whole, lengths)]
    kept_offsets = np.append(0, np.cumsum(np.where(whole, 0, lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(
        as_arrow(kept_offsets), pa.array(kept), type=kind, mask=pa.array(whole)
    )


def full_mask(sample: Sample) -> Mask:
    """A sample's mask, also where it is None."""
    return np.ones(len(sample.ids), np.bool_) if sample.trained is None else sample.trained


def prefix_rows(rows: PackedRows, prefix: list[int]) -> PackedRows:
    """Rows that begin with some tokens, which belong to the first document and are trained."""
    if not prefix:
        return rows
    head = Sample(np.array(prefix, np.int32))
    bodies = [
        Sample(np.array(ids.values), None if not mask.is_valid else np.array(mask.values))
        for ids, mask in zip(rows.input_ids, rows.loss_mask, strict=True)
    ]
    samples = [sample for body in bodies for sample in (head, body)]
    sizes = [len(head.ids) + len(body.ids) for body in bodies]
    offsets = np.append(0, np.cumsum(sizes))
    pieces = [np.array(lengths.values) for lengths in rows.document_lengths]
    for lengths in pieces:
        lengths[0] += len(prefix)
    ends = np.append(0, np.cumsum([len(lengths) for lengths in pieces]))
    return rows._replace(
        input_ids=list_array(np.concatenate([sample.ids for sample in samples]), offsets),
        loss_mask=mask_array(samples, offsets),
        document_lengths=list_array(np.concatenate(pieces), ends),
    )
