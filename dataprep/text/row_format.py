"""A format turns the rows of a source into samples: one class for each type of source."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.text.sample import Sample


class Encoded(NamedTuple):
    """Result of a format for one record.

    `content` is the record's text in one canonical form: it decides the evaluation split, which all
    `samples` of the record share, and which records are duplicates. `dropped` counts, by reason,
    tokens that the format itself cut off. A record without samples has dropped ones. `notes` counts
    by name what a reader of the rows would want to know: text that was lost, and the like. `lost`
    counts by reason the pictures that are in no sample.
    """

    content: str | bytes
    samples: list[Sample]
    dropped: dict[str, int] = {}  # noqa: RUF012  never written to
    notes: Mapping[str, int] = {}
    lost: dict[str, int] = {}  # noqa: RUF012  never written to


class Format(Protocol):
    """Turns rows of one source into samples; depends on the rows and its construction alone."""

    @property
    def columns(self) -> frozenset[str] | None:
        """The fields of a record that it reads; readers leave out the others. None: all."""
        ...

    def encode(self, records: Sequence[Record]) -> Iterable[Encoded | Reject]:
        """One result for each record, in order."""
        ...


class Document(NamedTuple):
    """A record's samples and counts, once its text is no longer needed.

    `dropped` counts by reason the tokens that are in no sample; where there are no samples, its
    last reason is that of the whole document. `lost` counts pictures alike.
    """

    split: str
    samples: list[Sample]
    dropped: dict[str, int]
    lost: dict[str, int] = {}  # noqa: RUF012  never written to


DocumentT = TypeVar("DocumentT", Encoded, Document)


def without_samples(document: DocumentT, reason: str) -> DocumentT:
    """A document whose tokens are all dropped, those of its samples for a reason."""
    tokens = sum(sample.tokens for sample in document.samples)
    pictures = sum(len(sample.pictures) for sample in document.samples)
    return document._replace(
        samples=[],
        dropped=document.dropped | {reason: tokens},
        lost=document.lost | ({reason: pictures} if pictures else {}),
    )
