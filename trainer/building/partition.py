"""Partition of a model's layers into stages: the most expensive one costs as little as it can."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.model_config import LayoutConfig
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.building.model_size import ModelSize, PartSize

# Patches that a tower sees for each token of a row: about 4 for each of a picture's tokens, and
# pictures fill about half of the rows of a usual set.
PATCHES_PER_TOKEN = 2.0


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


def cut(
    costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0, least: int = 1
) -> list[range]:
    """The layers, or halves of them, of each stage; each has at least one.

    Of all cuts whose most expensive stage costs least, the one with the least sum of squares, and
    among these the one whose first stages have more layers.

    Args:
        costs: of each layer, or half.
        first: cost of the embedding, in the first stage.
        last: cost of the head, in the last.
        least: layers of the first stage, as far as the others leave it so many.
    """
    layers = len(costs)
    assert 1 <= stages <= layers
    least = max(1, min(least, layers - stages + 1))
    sums = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        extra = first * (stage == 0) + last * (stage == stages - 1)
        return round(sums[stop] - sums[start] + extra, 6)

    # best[stop]: (highest cost, sum of squares, layers before each stage) of the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        stop: (cost(0, 0, stop), cost(0, 0, stop) ** 2, (0,)) for stop in range(least, layers + 1)
    }
    for stage in range(1, stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in range(least + stage, layers + 1):
            choices = []
            for start in range(least + stage - 1, stop):
                highest, squares, bounds = best[start]
                mine = cost(stage, start, stop)
                choices.append((max(highest, mine), squares + mine**2, -start, (*bounds, start)))
            highest, squares, _, bounds = min(choices)
            following[stop] = (highest, squares, bounds)
        best = following
    bounds = (*best[layers][2], layers)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def cut_as_listed(sizes: Sequence[float], stages: int, layers: int, apart: str = "") -> list[Span]:
    """The cut that a config spells out, in layers and halves of them.

    Args:
        apart: what is taken off the stages, for messages.

    Raises:
        ConfigError: it does not fit the model or the stages.
    """
    if len(sizes) != stages:
        raise ConfigError(
            f"partition = {list(sizes)} has {len(sizes)} entries, but pipeline_stages"
            f"{apart} = {stages}"
        )
    if sum(sizes) != layers:
        raise ConfigError(
            f"partition = {list(sizes)} adds up to {sum(sizes)}, but the model has {layers} layers"
        )
    bounds = pairwise([0, *accumulate(round(2 * size) for size in sizes)])
    return [Span(start, stop) for start, stop in bounds]


def partition(config: LayoutConfig, size: ModelSize) -> list[Span]:
    """Return the decoder layers of each stage, or chunk of one, as `partition` in the config asks.

    Raises:
        ConfigError: an explicit list that does not fit, or layers that have no halves.
    """
    stages = config.parts - config.vision_stages
    apart = [Span(0, 0)] * config.vision_stages
    if isinstance(config.partition, list):
        less = " - vision_stages" if apart else ""
        spans = apart + cut_as_listed(config.partition, stages, len(size.layers), less)
        if any(half for span in spans for _, half in span.pieces()):
            check_halves(size, f"partition = {config.partition}")
        return spans
    if config.half_layers:
        check_halves(size, "half_layers = true")
    pieces = size.halves if config.half_layers else size.layers
    cost = {"uniform": lambda part: 1.0, "memory": held, "cost": lambda part: part.active}
    price = cost[config.partition]
    unit = max(price(part) for part in size.layers)
    first = 0.0 if apart else first_cost(config, size) / unit
    last = price(size.head) / unit if config.partition != "uniform" else 0.0
    least = 1 if apart else size.stacked
    ranges = cut([price(part) / unit for part in pieces], stages, first, last, least)
    if config.half_layers:
        return [Span(part.start, part.stop) for part in ranges]
    return apart + [Span.whole(part) for part in ranges]


def first_cost(config: LayoutConfig, size: ModelSize) -> float:
    """Return what the first stage's embedding, and a vision tower beside it, count in a cut."""
    if config.partition == "memory":
        return held(size.embedding) + (0.0 if size.vision is None else held(size.vision))
    if config.partition == "uniform" or size.vision is None:
        return 0.0
    frozen = 1.0 if size.vision.trained else 0.5  # no backward pass
    return PATCHES_PER_TOKEN * frozen * size.vision.active


def check_halves(size: ModelSize, wish: str) -> None:
    """Some families compute attention and MLP side by side."""
    if not size.halves:
        raise ConfigError(
            f"{wish}: the layers of this model are not known to compute attention and MLP one "
            "after the other; use whole layers"
        )


def held(part: PartSize) -> float:
    """Return the memory of a part's weights, in units of a frozen weight of two bytes.

    Trained weights have a gradient and two moments, all in float32.
    """
    return part.weights - part.quantized + part.quantized_bytes / 2 + 7.0 * part.trained


def stacks_beside_tower(config: LayoutConfig, size: ModelSize) -> bool:
    """Return whether features that are added after decoder layers find these beside their tower."""
    return len(list(partition(config, size)[0])) >= size.stacked
