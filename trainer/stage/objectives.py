"""Losses of tokens, from their cross-entropy, and of pairs, from their log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headrace.schemas.train.objective_config import ObjectiveConfig

CERTAIN = -1e-7  # a mean log-probability above it has no odds
Span = tuple[int, int, int]  # place, first token, end


@dataclass(frozen=True)
class Answers:
    """One side of n pairs: [n] float32 sums over the trained tokens of each answer."""

    log_probability: Tensor  # of the model that is trained
    reference: Tensor | None  # of the model as it was, without gradient
    tokens: Tensor


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


def pair_losses(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> PairLosses:
    """The objective's loss of each pair, without the chosen answers' cross-entropy beside it.

    Sources: DPO https://arxiv.org/abs/2305.18290, hinge (SLiC) https://arxiv.org/abs/2305.10425,
    IPO https://arxiv.org/abs/2310.12036, APO-zero https://arxiv.org/abs/2408.06266, label smoothing
    (conservative DPO) https://ericmitchell.ai/cdpo.pdf, ORPO https://arxiv.org/abs/2403.07691.
    """
    if objective.kind == "orpo":
        return _odds_ratio(chosen, rejected, objective.beta)
    ratios = [_log_ratio(side) for side in (chosen, rejected)]
    rewards = [objective.beta * ratio for ratio in ratios]
    margin = rewards[0] - rewards[1]
    if objective.loss == "hinge":
        loss = torch.relu(1 - margin)
    elif objective.loss == "ipo":
        by_token = ratios[0] / chosen.tokens - ratios[1] / rejected.tokens
        loss = (by_token - 1 / (2 * objective.beta)) ** 2
    elif objective.loss == "apo_zero":
        loss = torch.sigmoid(-rewards[0]) + torch.sigmoid(rewards[1])
    else:
        wrong = objective.label_smoothing
        right_way, wrong_way = functional.logsigmoid(margin), functional.logsigmoid(-margin)
        loss = -(1 - wrong) * right_way - wrong * wrong_way
    return PairLosses(loss, rewards[0], rewards[1])


def _log_ratio(side: Answers) -> Tensor:
    assert side.reference is not None
    return side.log_probability - side.reference


def _odds_ratio(chosen: Answers, rejected: Answers, beta: float) -> PairLosses:
    """-beta log sigmoid(log odds of the chosen answer - of the rejected one), by mean token."""
    means = [side.log_probability / side.tokens for side in (chosen, rejected)]
    means = [mean.clamp(max=CERTAIN) for mean in means]
    odds = [mean - torch.log(-torch.expm1(mean)) for mean in means]
    loss = -beta * functional.logsigmoid(odds[0] - odds[1])
    return PairLosses(loss, beta * means[0], beta * means[1])


# below it a token counts as certain: at 0 a power under 1 has an infinite slope
LEAST_LOSS = 1e-7


def adjusted_losses(losses: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The objective's loss of each token.

    Args:
        losses: cross-entropy in nats, 0 where a token has no label; for `"focal_star"` that of
            gamma times the logits.

    Returns:
        The same shape; 0 without gradient where `losses` is 0.

    Sources: focal and focal-star loss https://arxiv.org/abs/1708.02002.
    """
    gamma = objective.gamma
    assert gamma is not None
    if objective.kind == "focal_star":
        return losses / gamma
    certain = losses.clamp(min=LEAST_LOSS)
    if objective.kind == "focal":
        adjusted = (-torch.expm1(-certain)) ** gamma * certain
    elif objective.kind == "inverse_focal":
        adjusted = (1 + torch.exp(-certain)) ** gamma * certain
    else:
        adjusted = certain**gamma / gamma
    return torch.where(losses > 0, adjusted, torch.zeros_like(losses))


def logit_factor(objective: ObjectiveConfig) -> float:
    """Return the factor that multiplies the logits in the adjusted loss."""
    if objective.kind != "focal_star":
        return 1.0
    assert objective.gamma is not None
    return objective.gamma
