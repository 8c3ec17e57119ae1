"""Cuts a model's layers into pipeline stages: the dearest stage is as cheap as it can be."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from headrace.schemas.errors import ConfigError


def cut(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """The decoder layers of each stage; each has at least one.

    Of all cuts whose dearest stage is cheapest, the one with the least sum of squares, and among
    these the one whose first stages have more layers.

    Args:
        costs: of each layer.
        first: cost of the embedding, in the first stage.
        last: cost of the head, in the last.
    """
    layers = len(costs)
    assert 1 <= stages <= layers
    sums = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        extra = first * (stage == 0) + last * (stage == stages - 1)
        return round(sums[stop] - sums[start] + extra, 6)

    # best[stop]: (dearest stage, sum of squares, layers before each stage) of the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        stop: (cost(0, 0, stop), cost(0, 0, stop) ** 2, (0,)) for stop in range(1, layers + 1)
    }
    for stage in range(1, stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in range(stage + 1, layers + 1):
            choices = []
            for start in range(stage, stop):
                dearest, squares, bounds = best[start]
                mine = cost(stage, start, stop)
                choices.append((max(dearest, mine), squares + mine**2, -start, (*bounds, start)))
            dearest, squares, _, bounds = min(choices)
            following[stop] = (dearest, squares, bounds)
        best = following
    bounds = (*best[layers][2], layers)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def cut_as_listed(sizes: Sequence[int], stages: int, layers: int) -> list[range]:
    """The cut that a config spells out.

    Raises:
        ConfigError: it does not fit the model or the stages.
    """
    if len(sizes) != stages:
        raise ConfigError(
            f"partition = {list(sizes)} has {len(sizes)} entries, but pipeline_stages = {stages}"
        )
    if sum(sizes) != layers:
        raise ConfigError(
            f"partition = {list(sizes)} adds up to {sum(sizes)}, but the model has {layers} layers"
        )
    return [range(start, stop) for start, stop in pairwise([0, *accumulate(sizes)])]
