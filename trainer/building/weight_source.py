"""A source of a model's weights, and the one that initializes them at random."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.architecture.architecture import Architecture, Growth
from headrace.trainer.architecture.model_files import Slice
from headrace.trainer.families.score import WEIGHT
from headrace.trainer.quantized.frozen_weight import FrozenWeight

NO_CUTS: Mapping[str, Slice] = MappingProxyType({})


class WeightSource(Protocol):
    """Gives parameters' values in order, by their names in the model without adapters."""

    def __enter__(self) -> "WeightSource": ...

    def __exit__(self, *error: object) -> None: ...

    def __contains__(self, name: str) -> bool: ...

    def read(
        self, wanted: Sequence[tuple[str, torch.Size]], cuts: Mapping[str, Slice] = NO_CUTS
    ) -> Iterator[Tensor | FrozenWeight]:
        """The values of parameters, in this order, each of its shape and of any type.

        Args:
            cuts: all that is wanted of some; a source that can reads no more, and gives that.
        """
        ...

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """The values of persistent buffers, likewise; None leaves one as it was constructed."""
        ...


class GrownWeights:
    """Another source's weights with rows for new tokens: the mean of those there are.

    Args:
        names: of the weights and biases that have a row for each token.
    """

    def __init__(self, source: WeightSource, growth: Growth, names: Collection[str]) -> None:
        self.source = source
        self.growth = growth
        self.names = names

    def __enter__(self) -> "GrownWeights":
        self.source.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.source.__exit__(*error)

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def read(
        self, wanted: Sequence[tuple[str, torch.Size]], cuts: Mapping[str, Slice] = NO_CUTS
    ) -> Iterator[Tensor | FrozenWeight]:
        """Yield the values that `WeightSource` promises.

        Raises:
            DataError: the embedding or the head is stored quantized, or as the source says.
        """
        rows = self.growth.rows
        stored = [
            (name, torch.Size((rows, *shape[1:])) if name in self.names else shape)
            for name, shape in wanted
        ]
        cuts = {name: cut for name, cut in cuts.items() if name not in self.names}
        for (name, shape), value in zip(wanted, self.source.read(stored, cuts), strict=True):
            if name not in self.names:
                yield value
            elif isinstance(value, Tensor):
                yield self._grown(value, shape)
            else:
                raise DataError(f"{name} is stored quantized, and new tokens need rows of it")

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """Read buffers as the source does."""
        return self.source.read_buffers(wanted)

    def _grown(self, value: Tensor, shape: torch.Size) -> Tensor:
        mean = value.float().mean(dim=0).to(value.dtype)
        grown = mean.expand(shape).clone()
        grown[: self.growth.rows] = value
        grown[list(self.growth.tokens)] = mean  # whose rows may have been there, untrained
        return grown


class ScoredWeights:
    """Another source's weights with those of a head of one number, if it has none.

    Args:
        config: transformers', of the model with that head.
    """

    def __init__(self, source: WeightSource, config: Any, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __enter__(self) -> "ScoredWeights":
        self.source.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.source.__exit__(*error)

    def __contains__(self, name: str) -> bool:
        return name == WEIGHT or name in self.source

    def read(
        self, wanted: Sequence[tuple[str, torch.Size]], cuts: Mapping[str, Slice] = NO_CUTS
    ) -> Iterator[Tensor | FrozenWeight]:
        """Yield the values that `WeightSource` promises."""
        asked, there = split_score(wanted, WEIGHT in self.source)
        found = self.source.read(asked, cuts)
        for (_, shape), is_there in zip(wanted, there, strict=True):
            yield next(found) if is_there else initial_score(self.config, shape, self.seed)

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """Read buffers as the source does."""
        return self.source.read_buffers(wanted)


def grown(source: WeightSource, architecture: Architecture) -> WeightSource:
    """Return a source of the weights that a model with new tokens has."""
    if architecture.growth is None:
        return source
    family = architecture.family
    names = {f"{family.embedding}.weight"}
    if not architecture.scored:
        names |= {f"{family.head}.weight", f"{family.head}.bias"}
    return GrownWeights(source, architecture.growth, names)


class RandomWeights:
    """Weights as transformers would initialize them, a function of seed and name alone."""

    def __init__(self, model: Any, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        text = model.config.get_text_config()
        self.deviation = getattr(text, "initializer_range", None) or 0.02

    def __enter__(self) -> "RandomWeights":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(
        self, wanted: Sequence[tuple[str, torch.Size]], cuts: Mapping[str, Slice] = NO_CUTS
    ) -> Iterator[Tensor]:
        """Yield the values that `WeightSource` promises, made on the device."""
        for name, shape in wanted:
            if len(shape) > 1:
                yield self._drawn(name, shape)
            else:
                yield self._vector(name, shape)

    def read_buffers(self, wanted: Sequence[tuple[str, torch.Size]]) -> Iterator[Tensor | None]:
        """Return None for each: all stay as they were constructed."""
        return iter([None] * len(wanted))

    def _drawn(self, name: str, shape: torch.Size) -> Tensor:
        """Draw normal values, on the device."""
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.seed, "weights", name))
        value = torch.empty(shape, device=self.device)
        return value.normal_(std=self.deviation, generator=generator)

    def _vector(self, name: str, shape: torch.Size) -> Tensor:
        """Biases are 0, norms as the model's own initialization sets them."""
        owner, _, attribute = name.rpartition(".")
        if attribute.endswith("bias"):
            return torch.zeros(shape)
        if owner == self.model.base_model_prefix:  # a vision projector's; a copy would be the model
            return self._drawn(name, shape)
        module = copy.deepcopy(self.model.get_submodule(owner)).to_empty(device="cpu")
        vector: nn.Parameter = getattr(module, attribute)
        nn.init.ones_(vector)
        with torch.random.fork_rng(devices=[]):  # sinks of attention are drawn
            torch.manual_seed(derive_seed(self.seed, "weights", name))
            self.model._init_weights(module)
        return vector.detach()


def initial_score(config: Any, shape: Sequence[int], seed: int) -> Tensor:
    """Return the weight of a new head, normal with the model's own deviation."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights", WEIGHT))
    deviation = getattr(config, "initializer_range", None) or 0.02
    return torch.empty(tuple(shape)).normal_(std=deviation, generator=generator)


def split_score(
    wanted: Sequence[tuple[str, torch.Size]], stored: bool
) -> tuple[list[tuple[str, torch.Size]], Iterator[bool]]:
    """Return what is asked of the files, and of each thing wanted whether that is there.

    Args:
        stored: whether the files have a score already.
    """
    there = [stored or name != WEIGHT for name, _ in wanted]
    return [item for item, found in zip(wanted, there, strict=True) if found], iter(there)
