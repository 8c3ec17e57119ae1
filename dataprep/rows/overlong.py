"""Treatment of documents that are longer than a row, where documents are kept whole."""

from typing import NamedTuple

from headrace.dataprep.text.sample import Sample, pair
from headrace.schemas.prepare.prepare_config import Overlong

TRUNCATED = "overlong document truncated"
TAIL = "tail of a block dropped"
DROPPED = "overlong document dropped"
PICTURES_DROPPED = "overlong document with pictures dropped"


class Fitted(NamedTuple):
    """Samples that fit into rows, and by reason the tokens, whole samples and pictures left out."""

    samples: list[Sample]
    tokens_dropped: dict[str, int]
    documents_dropped: dict[str, int]
    pictures_dropped: dict[str, int] = {}  # noqa: RUF012  never written to

    @property
    def trained_tokens(self) -> int:
        """Tokens of the samples that are labels."""
        return sum(sample.trained_tokens for sample in self.samples)


def fit_samples(samples: list[Sample], sequence_len: int, overlong: Overlong | None) -> Fitted:
    """Split, truncate or drop what is longer than `sequence_len`; None leaves all as it is.

    A pair is too long if one side is. What has nothing to train on after truncating is dropped, and
    so is what has pictures, which are not cut.
    """
    whole, long = without_long_pictures(samples, sequence_len)
    fitted = fit_texts(whole, sequence_len, overlong)
    if not long:
        return fitted
    tokens = sum(sample.tokens for sample in long)
    return fitted._replace(
        tokens_dropped=fitted.tokens_dropped | {PICTURES_DROPPED: tokens},
        documents_dropped=fitted.documents_dropped | {PICTURES_DROPPED: len(long)},
        pictures_dropped={PICTURES_DROPPED: sum(len(sample.pictures) for sample in long)},
    )


def without_long_pictures(
    samples: list[Sample], sequence_len: int
) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that may be cut or fit as they are, and those that have pictures and do
    not fit.
    """
    long = [bool(s.pictures) and is_long(s, sequence_len) for s in samples]
    if not any(long):
        return samples, []
    marked = list(zip(samples, long, strict=True))
    return [s for s, out in marked if not out], [s for s, out in marked if out]


def fit_texts(samples: list[Sample], sequence_len: int, overlong: Overlong | None) -> Fitted:
    """Split, truncate or drop samples without pictures."""
    if overlong is None or not any(is_long(sample, sequence_len) for sample in samples):
        return Fitted(samples, {}, {})
    if overlong == "split":
        return Fitted(
            [piece for sample in samples for piece in split(sample, sequence_len)], {}, {}
        )
    kept: list[Sample] = []
    truncated, dropped = 0, []
    for sample in samples:
        if not is_long(sample, sequence_len):
            kept.append(sample)
            continue
        cut = truncate(sample, sequence_len)
        if overlong == "drop" or not cut.is_trained:
            dropped.append(sample.tokens)
        else:
            kept.append(cut)
            truncated += sample.tokens - cut.tokens
    tokens = {TRUNCATED: truncated, DROPPED: sum(dropped)}
    documents = {DROPPED: len(dropped)} if dropped else {}
    return Fitted(kept, {reason: count for reason, count in tokens.items() if count}, documents)


def is_long(sample: Sample, sequence_len: int) -> bool:
    """Return whether a side has more tokens than a row."""
    rejected = 0 if sample.rejected_ids is None else len(sample.rejected_ids)
    return max(len(sample.ids), rejected) > sequence_len


def truncate(sample: Sample, sequence_len: int) -> Sample:
    """The first `sequence_len` tokens, of each side."""
    sides = [cut_sample(side, 0, sequence_len) for side in sample.sides()]
    return pair(*sides) if len(sides) == 2 else sides[0]


def split(sample: Sample, sequence_len: int) -> list[Sample]:
    """Pieces of `sequence_len` tokens; the last is shorter."""
    starts = range(0, len(sample.ids), sequence_len)
    return [cut_sample(sample, start, start + sequence_len) for start in starts]


def cut_sample(sample: Sample, start: int, end: int) -> Sample:
    """The tokens [start, end) of a sample of one side."""
    trained = None if sample.trained is None else sample.trained[start:end]
    return sample._replace(ids=sample.ids[start:end], trained=trained)


def drop_tail(samples: list[Sample], row_len: int) -> Fitted:
    """Leave out what would be a last row of less than `row_len` tokens."""
    excess = sum(len(sample.ids) for sample in samples) % row_len
    kept, left, documents = list(samples), excess, 0
    while left:
        last = kept.pop()
        if len(last.ids) > left:
            kept.append(cut_sample(last, 0, len(last.ids) - left))
        else:
            documents += 1
        left = max(0, left - len(last.ids))
    tokens = {TAIL: excess} if excess else {}
    return Fitted(kept, tokens, {TAIL: documents} if documents else {})
