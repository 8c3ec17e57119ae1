"""Both sides of pairs, and what is compared of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Span = tuple[int, int, int]  # place, first token, end


@dataclass(frozen=True)
class Answers:
    """One side of n pairs: [n] float32 sums over the trained tokens of each answer."""

    log_probability: Tensor  # of the model that is trained
    reference: Tensor | None  # of the model as it was, without gradient
    tokens: Tensor


def sum_answers(
    losses: Tensor,
    reference: Tensor | None,
    trained: Tensor,
    pairs: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Answers, Answers]:
    """The chosen and the rejected side of a micro-batch's pairs, from the losses of their tokens.

    Args:
        losses: [2b, s] cross-entropy; place k holds chosen answers, place b + k the rejected ones.
        reference: likewise, of the model as it was.
        trained: [2b, s] bool, where a token has a label.
        pairs: [b] tokens of both sides of each place's pairs, in order.
    """
    chosen, rejected = (sum_side(losses, reference, trained, pairs, side) for side in range(2))
    return chosen, rejected


def sum_side(
    losses: Tensor,
    reference: Tensor | None,
    trained: Tensor,
    pairs: Sequence[Sequence[tuple[int, int]]],
    side: int,
) -> Answers:
    """One side of a micro-batch's pairs.

    Args: as `sum_answers`.
        side: 0 for the first half of the places, 1 for the second.
    """
    spans: list[Span] = []
    for place, of_place in enumerate(pairs):
        stop = 0
        for pair in of_place:
            start, stop = stop, stop + pair[side]
            spans.append((place + side * len(pairs), start, stop))

    def sums(values: Tensor) -> Tensor:
        parts = [values[place, start:stop].sum() for place, start, stop in spans]
        return torch.stack(parts) if parts else values.new_zeros(0)

    return Answers(
        log_probability=-sums(losses),
        reference=None if reference is None else -sums(reference),
        tokens=sums(trained.to(losses.dtype)).clamp(min=1),
    )


def smoothed_sigmoid(margin: Tensor, wrong: float) -> Tensor:
    """Return -log sigmoid of a margin between rewards.

    Args:
        wrong: share of pairs that are taken to be the wrong way round.
    """
    right_way, wrong_way = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return -(1 - wrong) * right_way - wrong * wrong_way


def log_ratios(answers: Answers) -> Tensor:
    """Return how much likelier than to the reference answers are, [n] in nats."""
    assert answers.reference is not None
    return answers.log_probability - answers.reference
