"""The loss of each row, from the losses of the tokens of its place."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.data.placed_rows import PlacedRow
from headrace.trainer.run.metrics import RowLoss


def row_losses(
    token_losses: NDArray[np.float32],
    labels: NDArray[np.int64],
    rows: Sequence[Sequence[Sequence[PlacedRow]]],
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
    # up to the next start: filling and places without a row add zeros
    losses = np.add.reduceat(token_losses.ravel(), starts, dtype=np.float64)
    counts = np.add.reduceat(labels.ravel() != IGNORED_LABEL, starts, dtype=np.int64)
    placed = (row for place in places for row in place)
    return [
        RowLoss(row.source, loss, count)
        for row, loss, count in zip(placed, losses.tolist(), counts.tolist(), strict=True)
    ]
