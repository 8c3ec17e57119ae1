"""Inputs of a stage beside the hidden states, and its outputs."""

from dataclasses import dataclass, field

from torch import Tensor

from headrace.kernels.token_statistics import TokenStatistics
from headrace.trainer.batches.extras import NO_EXTRAS, Extras
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of a stage beside the hidden states. b rows of s tokens."""

    document_lengths: list[list[int]]  # [b]
    row_lengths: list[int]  # [b] tokens of each row, padding left out
    labels: Tensor | None  # [b, s] int64, last stage only
    loss_scale: float  # 1 / trained tokens of the global batch, or 1 / its pairs
    router_scale: float  # tokens of this micro-batch / tokens of the global batch
    seed: int  # of this micro-batch's dropout
    extras: Extras = NO_EXTRAS
    chosen_scale: float = 0.0  # 1 / trained tokens of all chosen answers
    wants_statistics: bool = False  # of each token, on the last stage
    rows: RowSlice = WHOLE_ROWS  # the tokens that are here; labels and extras are of them alone


@dataclass(frozen=True)
class PairLosses:
    """Losses and rewards of n pairs, each [n]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    def detach(self) -> "PairLosses":
        """Return the values without gradient."""
        values = (self.loss, self.chosen_reward, self.rejected_reward)
        return PairLosses(*(value.detach() for value in values))


@dataclass(frozen=True)
class AnswerLosses:
    """Losses and rewards of n single answers, and the baseline of each, [n]."""

    loss: Tensor
    reward: Tensor
    baseline: Tensor

    def detach(self) -> "AnswerLosses":
        """Return the values without gradient."""
        values = (self.loss, self.reward, self.baseline)
        return AnswerLosses(*(value.detach() for value in values))


@dataclass(frozen=True)
class StageOutput:
    """Outputs of a stage.

    `router_loss` is this stage's part of the routers' loss; on the last stage `value` holds it
    already, on others it is to be differentiated beside the hidden states. Of slices of rows it is
    not known yet: `router_parts` are what it is made of.
    """

    value: Tensor  # hidden states for the next stage, or the loss: the scalar to differentiate
    token_losses: Tensor | None = None  # last stage: [b, s] cross-entropy, float32, detached
    adjusted_losses: Tensor | None = None  # what is minimized in its place, likewise
    pairs: PairLosses | AnswerLosses | None = None  # last stage, objectives of answers; detached
    router_loss: Tensor | None = None  # stages with routers: scalar, scaled as it enters the loss
    statistics: TokenStatistics | None = None  # last stage, where wanted; of b * s tokens
    hidden_norms: Tensor | None = None  # likewise, [b, s] float32: of what the head is given
    router_parts: list[Tensor] = field(default_factory=list)  # see `balance_parts`; of each layer
