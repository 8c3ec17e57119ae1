"""Samples, which every format makes of rows: tokenized documents with a loss mask."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.text.tokenizer import Ids

Mask = npt.NDArray[np.bool_]


class Sample(NamedTuple):
    """One tokenized document of at least one token; a preference pair holds two answers.

    `ids` and `trained` are of shape [tokens]; `trained` tells which tokens are labels, None that
    all are. `rejected_ids` is None but in preference sets.
    """

    ids: Ids
    trained: Mask | None = None
    rejected_ids: Ids | None = None
    rejected_trained: Mask | None = None

    def sides(self) -> list["Sample"]:
        """The sample, or the two sides of a pair, each as one of its own."""
        if self.rejected_ids is None:
            return [self]
        return [Sample(self.ids, self.trained), self.other_side()]

    def other_side(self) -> "Sample":
        """The rejected side of a pair."""
        assert self.rejected_ids is not None
        return Sample(self.rejected_ids, self.rejected_trained)

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return len(self.ids) + (0 if self.rejected_ids is None else len(self.rejected_ids))

    @property
    def trained_tokens(self) -> int:
        """Tokens of both sides that are labels."""
        other = 0 if self.rejected_ids is None else self.other_side().trained_tokens
        return count_trained(self.ids, self.trained) + other

    @property
    def is_trained(self) -> bool:
        """True where a token is predicted: one that is a label, after the first of its side."""
        return all(
            count_trained(side.ids[1:], None if side.trained is None else side.trained[1:])
            for side in self.sides()
        )


def pair(chosen: Sample, rejected: Sample) -> Sample:
    """Two samples as the sides of one."""
    return Sample(chosen.ids, chosen.trained, rejected.ids, rejected.trained)


class Encoded(NamedTuple):
    """Result of a format for one record.

    `content` is the record's text in one canonical form: it decides the evaluation split, which all
    `samples` of the record share, and which records are duplicates. `dropped` counts, by reason,
    tokens that the format itself cut off. A record without samples has dropped ones. `notes` counts
    by name what a reader of the rows would want to know: text that was lost, and the like.
    """

    content: str | bytes
    samples: list[Sample]
    dropped: dict[str, int] = {}  # noqa: RUF012  never written to
    notes: Mapping[str, int] = {}


class Format(Protocol):
    """Turns rows of one source into samples; depends on the rows and its construction alone."""

    @property
    def columns(self) -> frozenset[str] | None:
        """The fields of a record that it reads; readers leave out the others. None: all."""
        ...

    def encode(self, records: Sequence[Record]) -> Iterable[Encoded | Reject]:
        """One result for each record, in order."""
        ...


def count_trained(ids: Ids, trained: Mask | None) -> int:
    """Return the number of tokens that are labels."""
    return len(ids) if trained is None else int(np.count_nonzero(trained))
