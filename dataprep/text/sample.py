"""Samples, which every format makes of rows: tokenized documents with a loss mask."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.dataprep.images.picture import Picture
from headrace.dataprep.text.tokens import Ids

Mask = npt.NDArray[np.bool_]


class Sample(NamedTuple):
    """One tokenized document of at least one token; a preference pair holds two answers.

    `ids` and `trained` are of shape [tokens]; `trained` tells which tokens are labels, None that
    all are. `rejected_ids` is None but in preference sets, and `desirable`, the label of an answer
    that has no other beside it, but in unpaired ones. `pictures` fill the placeholders among the
    ids, in their order; both sides of a pair share them.
    """

    ids: Ids
    trained: Mask | None = None
    rejected_ids: Ids | None = None
    rejected_trained: Mask | None = None
    desirable: bool | None = None
    pictures: tuple[Picture, ...] = ()

    def sides(self) -> list["Sample"]:
        """The sample, or the two sides of a pair, each as one of its own."""
        if self.rejected_ids is None:
            return [self]
        chosen = self._replace(rejected_ids=None, rejected_trained=None)
        return [chosen, self.other_side()]

    def other_side(self) -> "Sample":
        """The rejected side of a pair."""
        assert self.rejected_ids is not None
        return Sample(self.rejected_ids, self.rejected_trained, pictures=self.pictures)

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
    return chosen._replace(rejected_ids=rejected.ids, rejected_trained=rejected.trained)


def count_trained(ids: Ids, trained: Mask | None) -> int:
    """Return the number of tokens that are labels."""
    return len(ids) if trained is None else int(np.count_nonzero(trained))
