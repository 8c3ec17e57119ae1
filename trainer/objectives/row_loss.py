"""Records of losses: values of tokens, and the loss of a row or a pair."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


@dataclass(frozen=True)
class TokenValues:
    """Values of the last stage's m micro-batches, each [m, b, s]."""

    losses: Values  # cross-entropy in nats, 0 where a token has no label
    adjusted: Values | None = None  # what is minimized in its place
    entropies: Values | None = None  # where statistics are wanted, and so the next two
    ranks: Values | None = None  # logits larger than the label's
    hidden_norms: Values | None = None


@dataclass(frozen=True)
class PairLoss:
    """A pair's loss, and how much more likely than to the reference its answers are, times beta."""

    loss: float
    chosen_reward: float
    rejected_reward: float
    chosen_weight: float  # of the chosen answers' cross-entropy beside the loss of pairs


@dataclass(frozen=True)
class AnswerLoss:
    """A single answer's loss, its reward, and what that is compared with."""

    loss: float
    reward: float
    baseline: float
    desirable: bool


@dataclass(frozen=True)
class RowLoss:
    """Summed loss of one row, in nats, over its trained tokens.

    `unadjusted` is its cross-entropy where something else is minimized. Of a pair, `loss` is the
    cross-entropy of the chosen answer, and what is minimized stands in `pair`; of a single answer
    with a label, in `answer`.
    """

    source: str
    loss: float
    trained_tokens: int
    unadjusted: float | None = None
    pair: PairLoss | None = None
    answer: AnswerLoss | None = None

    @property
    def cross_entropy(self) -> float:
        """Return the cross-entropy in nats, summed over the trained tokens."""
        return self.loss if self.unadjusted is None else self.unadjusted
