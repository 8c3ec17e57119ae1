"""The loss of each row, from the losses of the tokens of its place."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.batches.extras import pairs_of
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.objectives.row_loss import AnswerLoss, PairLoss, RowLoss, TokenValues
from headrace.trainer.shards.packed_rows import PackedRow


def token_rows(tokens: TokenValues, inputs: StepInputs) -> list[RowLoss]:
    """Return the losses of a replica's rows."""
    assert inputs.rows is not None and inputs.labels is not None
    labels = inputs.labels.numpy()
    plain = row_losses(tokens.losses, labels, inputs.rows)
    if tokens.adjusted is None:
        return plain
    adjusted = row_losses(tokens.adjusted, labels, inputs.rows)
    return [
        replace(row, unadjusted=unadjusted.loss)
        for row, unadjusted in zip(adjusted, plain, strict=True)
    ]


def pair_rows(
    tokens: TokenValues, rewards: list[list[float]], inputs: StepInputs, chosen_weight: float
) -> list[RowLoss]:
    """Return the losses of a replica's pairs.

    Args:
        rewards: [n][3] loss, chosen and rejected reward of each.
        chosen_weight: of the chosen answers' cross-entropy beside the loss of pairs.
    """
    pairs = pairs_of(inputs.extras)
    assert inputs.rows is not None and inputs.labels is not None and pairs is not None
    chosen = chosen_losses(tokens.losses, inputs.labels.numpy(), inputs.rows, pairs)
    return [
        replace(row, pair=PairLoss(loss, better, worse, chosen_weight))
        for row, (loss, better, worse) in zip(chosen, rewards, strict=True)
    ]


def answer_rows(
    tokens: TokenValues, values: list[list[float]], inputs: StepInputs
) -> list[RowLoss]:
    """Return the losses of a replica's single answers.

    Args:
        values: [n][3] loss, reward and baseline of each.
    """
    assert inputs.rows is not None and inputs.labels is not None
    labels, own = inputs.labels.numpy(), len(inputs.rows[0])
    plain = row_losses(tokens.losses[:, :own], labels[:, :own], inputs.rows)
    desirable = [label for extras in inputs.extras for label in extras.desirable or ()]
    return [
        replace(row, answer=AnswerLoss(loss, reward, baseline, label))
        for row, (loss, reward, baseline), label in zip(plain, values, desirable, strict=True)
    ]


def row_losses(
    token_losses: NDArray[np.float32],
    labels: NDArray[np.int32],
    rows: Sequence[Sequence[Sequence[PackedRow]]],
) -> list[RowLoss]:
    """Sums over the tokens of each row, in float64.

    Args:
        token_losses: [m, b, s] nats, 0 where a token has no label.
        labels: [m, b, s].
        rows: [m][b] the rows of each place, in order.
    """
    places = [place for micro_batch in rows for place in micro_batch]
    starts: list[int] = []
    for number, place in enumerate(places):
        ends = np.cumsum([row.tokens for row in place], dtype=np.int64)
        starts += (number * labels.shape[-1] + np.append(0, ends)[: len(place)]).tolist()
    if not starts:
        return []
    # up to the next start: padding and places without a row add zeros
    losses = np.add.reduceat(token_losses.ravel(), starts, dtype=np.float64)
    counts = np.add.reduceat(labels.ravel() != IGNORED_LABEL, starts, dtype=np.int64)
    placed = (row for place in places for row in place)
    return [
        RowLoss(row.source, loss, count)
        for row, loss, count in zip(placed, losses.tolist(), counts.tolist(), strict=True)
    ]


def chosen_losses(
    token_losses: NDArray[np.float32],
    labels: NDArray[np.int32],
    rows: Sequence[Sequence[Sequence[PackedRow]]],
    pairs: Sequence[Sequence[Sequence[tuple[int, int]]]],
) -> list[RowLoss]:
    """`row_losses` of the chosen answers, which have the first half of the places."""
    half = labels.shape[1] // 2
    chosen = [
        [
            [row._replace(tokens=tokens) for row, (tokens, _) in zip(*place, strict=True)]
            for place in zip(*micro_batch, strict=True)
        ]
        for micro_batch in zip(rows, pairs, strict=True)
    ]
    return row_losses(token_losses[:, :half], labels[:, :half], chosen)
