"""Rows that are token ids already, with the tokens to train on marked in any of the usual ways."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.input.streams import refuse
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Mask, Sample
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.source_config import SourceConfig

IDS, LABELS, ATTENTION, LOSS = "input_ids", "labels", "attention_mask", "loss_mask"
LENGTHS = ("document_lengths", "seq_lengths")  # ours, and TRL's
CUMULATED, POSITIONS = "cu_seqlens", "position_ids"
REJECTED, CLASS = "rejected_input_ids", "control_class"
ALIGNED = (IDS, LABELS, ATTENTION, LOSS, POSITIONS)  # a value for each token
IGNORED = -100
UNTRAINED = "nothing in it is trained"
PADDING = "padding"

Columns = Mapping[str, npt.NDArray[np.int64]]


class PretokenizedFormat:
    """Ids as they are: nothing is added, padding is left out, labels of -100 are not trained.

    A packed row, which `document_lengths`, `cu_seqlens` or restarting `position_ids` tell, becomes
    its documents again.
    """

    columns = frozenset([*ALIGNED, *LENGTHS, CUMULATED, REJECTED, CLASS])

    def __init__(self, source: SourceConfig, tokenizer: TokenizerSpec) -> None:
        self.size = tokenizer.vocabulary_size
        self.control_class = source.control_class

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One result for each record."""
        return (self.take(record) for record in records)

    def take(self, record: Record) -> Encoded | Reject:
        """The ids of a record."""
        fields = {name: value for name, value in record.fields.items() if value is not None}
        if IDS not in fields:
            return refuse(record.place, "missing field", f'no field "{IDS}"')
        if problem := self.lost(fields):
            return refuse(record.place, *problem)
        arrays = {name: as_integers(value) for name, value in fields.items() if name != CLASS}
        for name, array in arrays.items():
            if array is None:
                detail = f'field "{name}" is {json_type(fields[name])}, not a list of integers'
                return refuse(record.place, "not a list of integers", detail)
        found = {name: array for name, array in arrays.items() if array is not None}
        problem = self.find_problem(found)
        return refuse(record.place, *problem) if problem else finish(record, found)

    def lost(self, fields: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return what of a row would be lost: reason and detail."""
        if REJECTED in fields:
            return "a pair", f'field "{REJECTED}" is there; pairs are no rows of one answer'
        own = fields.get(CLASS)
        if own is not None and own != self.control_class:
            detail = f"it is {own}, control_class of the source {self.control_class}"
            return "control_class differs", detail
        return None

    def find_problem(self, fields: Columns) -> tuple[str, str] | None:
        """Why these columns do not make a row: reason and detail."""
        ids = fields[IDS]
        for name in ALIGNED:
            if name in fields and len(fields[name]) != len(ids):
                return "lengths differ", f"{len(ids)} ids, {len(fields[name])} in {name}"
        wrong = np.flatnonzero((ids < 0) | (ids >= self.size))
        if len(wrong):
            first = int(wrong[0])
            return (
                "id outside the vocabulary",
                f"{int(ids[first])} at token {first}, the tokenizer has {self.size}",
            )
        labels = fields.get(LABELS, ids)
        other = np.flatnonzero((labels != ids) & (labels != IGNORED))
        if len(other):
            first = int(other[0])
            detail = f"label {int(labels[first])} at token {first}, whose id is {int(ids[first])}"
            return "labels differ from ids", detail
        return document_problem(fields)


def document_problem(fields: Columns) -> tuple[str, str] | None:
    """Why a row cannot be cut into its documents: reason and detail."""
    size = len(fields[IDS])
    numbered = np.flatnonzero(fields.get(ATTENTION, np.zeros(0)) > 1)
    if len(numbered):
        detail = f"{ATTENTION} is {int(fields[ATTENTION][numbered[0]])} at token {int(numbered[0])}"
        return "documents are not told", f"{detail}, neither 0 nor 1; give document_lengths"
    for name in LENGTHS:
        lengths = fields.get(name)
        if lengths is None:
            continue
        outside = np.any((lengths < 0) | (lengths > size))
        if outside or int(lengths.sum()) != size:
            return "documents do not fit", f"{name} do not sum to the {size} ids"
    bounds = fields.get(CUMULATED)
    if bounds is not None and not is_rising(bounds, size):
        return "documents do not fit", f"{CUMULATED} do not rise from 0 to the {size} ids"
    return None


def is_rising(bounds: npt.NDArray[np.int64], size: int) -> bool:
    """Return whether starts of documents and the last one's end rise from 0 to a row's end.

    The end may lie one before the row's: some writers leave the last label out.
    """
    if not len(bounds) or bounds[0] != 0 or bounds[-1] not in (size - 1, size):
        return False
    return bool(np.all(bounds[1:] >= bounds[:-1]))


def document_starts(fields: Columns) -> npt.NDArray[np.int64]:
    """The first tokens of a row's documents, that of the row among them."""
    size = len(fields[IDS])
    starts = np.zeros(0, np.int64)
    lengths = next((fields[name] for name in LENGTHS if name in fields), None)
    if lengths is not None:
        starts = np.cumsum(lengths) - lengths
    elif CUMULATED in fields:
        starts = fields[CUMULATED][:-1]
    elif POSITIONS in fields:
        starts = np.flatnonzero(fields[POSITIONS] == 0)
    return np.unique(np.append(0, starts[starts < size]))


def finish(record: Record, fields: Columns) -> Encoded | Reject:
    """The samples of one row."""
    ids = fields[IDS].astype(np.int32)
    trained = fields.get(LABELS, fields[IDS]) != IGNORED
    if LOSS in fields:
        trained &= fields[LOSS] != 0
    kept: Mask = fields[ATTENTION] != 0 if ATTENTION in fields else np.ones(len(ids), np.bool_)
    documents = np.searchsorted(document_starts(fields), np.flatnonzero(kept), side="right")
    ids, trained = ids[kept], trained[kept]
    padding = {PADDING: int(len(kept) - len(ids))} if len(ids) < len(kept) else {}
    if not len(ids):
        return refuse(record.place, "empty document", "no ids")
    cuts = np.flatnonzero(np.diff(documents)) + 1
    content = ids.tobytes() + np.packbits(trained).tobytes() + cuts.tobytes()
    pairs = zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)
    parts = [Sample(part, None if mask.all() else mask) for part, mask in pairs]
    # one token without a mask is text that happens to be short; a mask of the first alone is none
    samples = [part for part in parts if part.trained is None or part.is_trained]
    untrained = len(ids) - sum(len(sample.ids) for sample in samples)
    return Encoded(content, samples, padding | ({UNTRAINED: untrained} if untrained else {}))


def as_integers(value: Any) -> npt.NDArray[np.int64] | None:
    """A list of integers or booleans as an array, None for anything else."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "biu"):
        return None
    return array.astype(np.int64)
