"""Cuts a model's layers into pipeline stages: the dearest stage is as cheap as it can be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.half_layer import Half


@dataclass(frozen=True)
class Span:
    """The decoder layers of a stage, counted in halves: layer i's attention is 2i, its MLP 2i + 1.

    Iterating gives the numbers of the layers that are there at least in half.
    """

    start: int
    stop: int

    @classmethod
    def whole(cls, layers: range) -> "Span":
        """Layers that are not cut."""
        return cls(2 * layers.start, 2 * layers.stop)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start // 2, (self.stop + 1) // 2))

    def __len__(self) -> int:
        return len(range(self.start // 2, (self.stop + 1) // 2))

    def half(self, layer: int) -> Half | None:
        """Return the only half of a layer that is there; None if the layer is whole."""
        if 2 * layer < self.start:
            return "mlp"
        return "attention" if 2 * layer + 1 >= self.stop else None

    def pieces(self) -> list[tuple[int, Half | None]]:
        """The layers, and what of them is there."""
        return [(layer, self.half(layer)) for layer in self]

    def __str__(self) -> str:
        def name(piece: tuple[int, Half | None]) -> str:
            layer, half = piece
            return str(layer) if half is None else f"{layer} ({half})"

        first, *others = map(name, self.pieces())
        return f"{first}-{others[-1]}" if others else first


@dataclass(frozen=True)
class StageCut:
    """Part of a model, cut into `parts`, that one stage holds, or one chunk of a stage."""

    number: int
    parts: int
    layers: Span

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.parts - 1


def cut(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """The layers, or halves of them, of each stage; each has at least one.

    Of all cuts whose dearest stage is cheapest, the one with the least sum of squares, and among
    these the one whose first stages have more layers.

    Args:
        costs: of each layer, or half.
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


def cut_as_listed(sizes: Sequence[float], stages: int, layers: int) -> list[Span]:
    """The cut that a config spells out, in layers and halves of them.

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
    bounds = pairwise([0, *accumulate(round(2 * size) for size in sizes)])
    return [Span(start, stop) for start, stop in bounds]
