"""What becomes of documents that are longer than a row, where documents are kept whole."""

from typing import NamedTuple

from headrace.dataprep.formats.sample import Sample
from headrace.schemas.prepare_config import Overlong

TRUNCATED = "overlong document truncated"
DROPPED = "overlong document dropped"


class Fitted(NamedTuple):
    """Samples that fit into rows, and by reason the tokens and whole samples left out."""

    samples: list[Sample]
    tokens_dropped: dict[str, int]
    documents_dropped: dict[str, int]

    @property
    def trained_tokens(self) -> int:
        """Tokens of the samples that are labels."""
        return sum(sample.trained_tokens for sample in self.samples)


def fit_samples(samples: list[Sample], sequence_len: int, overlong: Overlong | None) -> Fitted:
    """Split, truncate or drop what is longer than `sequence_len`; None leaves all as it is."""
    long = [sample for sample in samples if len(sample.ids) > sequence_len]
    if overlong is None or not long:
        return Fitted(samples, {}, {})
    excess = sum(len(sample.ids) - sequence_len for sample in long)
    if overlong == "truncate":
        cut = [cut_sample(sample, 0, sequence_len) for sample in samples]
        return Fitted(cut, {TRUNCATED: excess}, {})
    if overlong == "drop":
        short = [sample for sample in samples if len(sample.ids) <= sequence_len]
        tokens = excess + len(long) * sequence_len
        return Fitted(short, {DROPPED: tokens}, {DROPPED: len(long)})
    return Fitted([piece for sample in samples for piece in split(sample, sequence_len)], {}, {})


def split(sample: Sample, sequence_len: int) -> list[Sample]:
    """Pieces of `sequence_len` tokens; the last is shorter."""
    starts = range(0, len(sample.ids), sequence_len)
    return [cut_sample(sample, start, start + sequence_len) for start in starts]


def cut_sample(sample: Sample, start: int, end: int) -> Sample:
    """The tokens [start, end) of a sample of one side."""
    trained = None if sample.trained is None else sample.trained[start:end]
    return Sample(sample.ids[start:end], trained)
