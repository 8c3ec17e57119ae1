"""Rows that are token ids already, with the tokens to train on marked in any of the usual ways."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.dataprep.formats.sample import Encoded, Mask, Sample
from headrace.dataprep.records import Record, Reject, json_type, refuse
from headrace.dataprep.tokenizer import TokenizerSpec

IDS, LABELS, ATTENTION, LOSS = "input_ids", "labels", "attention_mask", "loss_mask"
IGNORED = -100
UNTRAINED = "nothing in it is trained"
PADDING = "padding"


class PretokenizedFormat:
    """Ids as they are: nothing is added, padding is left out, labels of -100 are not trained."""

    columns = frozenset([IDS, LABELS, ATTENTION, LOSS])

    def __init__(self, tokenizer: TokenizerSpec) -> None:
        self.size = tokenizer.vocabulary_size

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One document for each record."""
        return (self.take(record) for record in records)

    def take(self, record: Record) -> Encoded | Reject:
        """The ids of a record."""
        fields = {name: value for name, value in record.fields.items() if value is not None}
        if IDS not in fields:
            return refuse(record.place, "missing field", f'no field "{IDS}"')
        arrays = {name: as_integers(value) for name, value in fields.items()}
        for name, array in arrays.items():
            if array is None:
                detail = f'field "{name}" is {json_type(fields[name])}, not a list of integers'
                return refuse(record.place, "not a list of integers", detail)
        found = {name: array for name, array in arrays.items() if array is not None}
        problem = self.find_problem(found)
        return refuse(record.place, *problem) if problem else finish(record, found)

    def find_problem(self, fields: dict[str, npt.NDArray[np.int64]]) -> tuple[str, str] | None:
        """Why these columns do not make a row: reason and detail."""
        ids = fields[IDS]
        for name, values in fields.items():
            if len(values) != len(ids):
                return "lengths differ", f"{len(ids)} ids, {len(values)} in {name}"
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
        return None


def finish(record: Record, fields: dict[str, npt.NDArray[np.int64]]) -> Encoded | Reject:
    """The sample of one row."""
    ids = fields[IDS].astype(np.int32)
    trained = fields.get(LABELS, fields[IDS]) != IGNORED
    if LOSS in fields:
        trained &= fields[LOSS] != 0
    kept: Mask = fields[ATTENTION] != 0 if ATTENTION in fields else np.ones(len(ids), np.bool_)
    ids, trained = ids[kept], trained[kept]
    padding = {PADDING: int(len(kept) - len(ids))} if len(ids) < len(kept) else {}
    if not len(ids):
        return refuse(record.place, "empty document", "no ids")
    content = ids.tobytes() + np.packbits(trained).tobytes()
    if not trained[1:].any():  # nothing predicts the first
        return Encoded(content, [], {**padding, UNTRAINED: len(ids)})
    return Encoded(content, [Sample(ids, None if trained.all() else trained)], padding)


def as_integers(value: Any) -> npt.NDArray[np.int64] | None:
    """A list of integers or booleans as an array, None for anything else."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "biu"):
        return None
    return array.astype(np.int64)
