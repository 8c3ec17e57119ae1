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
    places = len(pairs)
    spans: tuple[list[Span], list[Span]] = ([], [])
    for place, of_place in enumerate(pairs):
        for side in range(2):
            stop = 0
            for pair in of_place:
                start, stop = stop, stop + pair[side]
                spans[side].append((place + side * places, start, stop))

    def sums(values: Tensor, side: int) -> Tensor:
        parts = [values[place, start:stop].sum() for place, start, stop in spans[side]]
        return torch.stack(parts) if parts else values.new_zeros(0)

    chosen, rejected = (
        Answers(
            log_probability=-sums(losses, side),
            reference=None if reference is None else -sums(reference, side),
            tokens=sums(trained.to(losses.dtype), side).clamp(min=1),
        )
        for side in range(2)
    )
    return chosen, rejected


def smoothed_sigmoid(margin: Tensor, wrong: float) -> Tensor:
    """Return -log sigmoid of a margin between rewards.

    Args:
        wrong: share of pairs that are taken to be the wrong way round.
    """
    right_way, wrong_way = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return -(1 - wrong) * right_way - wrong * wrong_way
