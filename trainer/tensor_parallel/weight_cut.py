"""The parts of weights that a rank holds, of weights that several ranks share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.trainer.architecture.model_files import Slice
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard

if TYPE_CHECKING:
    from headrace.trainer.tensor_parallel.styles import Style


@dataclass(frozen=True)
class WeightCut:
    """One weight's cut along a dimension.

    Attributes:
        shape: of the whole.
        blocks: along the dimension, each of which is cut, as the ranks of adapters of fused
            experts, whose experts lie side by side in each.
    """

    shard: TensorShard
    shape: torch.Size
    dim: int
    blocks: int = 1

    @property
    def ranks(self) -> int:
        """Return how many ranks share the weight."""
        return self.shard.ranks

    @property
    def slice(self) -> Slice | None:
        """Return the only slice of the dimension that this rank holds; None of several blocks."""
        size = self.shape[self.dim] // self.ranks
        start = self.shard.rank * size
        return Slice(self.dim, start, start + size) if self.blocks == 1 else None

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor like the whole weight, in memory of its own; what is
        the part already is given back.
        """
        if self.slice is not None and whole.shape == self.slice.shape(self.shape):
            return whole
        split = whole.unflatten(self.dim, (self.blocks, -1))
        return self.shard.share(split, self.dim + 1).flatten(self.dim, self.dim + 1).clone()

    def whole(self, part: Tensor) -> Tensor:
        """Put the ranks' parts together, at each of them; all take part."""
        split = part.unflatten(self.dim, (self.blocks, -1))
        parts = self.shard.all_gather(split)
        return torch.cat(parts, dim=self.dim + 1).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class StageCuts:
    """The parts of a stage's weights that a rank holds; by default all of them.

    Attributes:
        styles: of modules, by their names without adapters, numbers of layers left open.
        cuts: by the parameter's name in the whole model; weights that are not named are whole.
        partial: names of those whose gradients are to be added up over the ranks.
    """

    shard: TensorShard = WHOLE_WEIGHTS
    styles: Mapping[str, "Style"] = field(default_factory=lambda: MappingProxyType({}))
    cuts: Mapping[str, WeightCut] = field(default_factory=lambda: MappingProxyType({}))
    partial: frozenset[str] = frozenset()

    def part(self, name: str, value: Tensor) -> Tensor:
        """Return what this rank holds of a parameter's value."""
        cut = self.cuts.get(name)
        return value if cut is None else cut.part(value)

    def whole(self, name: str, value: Tensor) -> Tensor:
        """Put a parameter's parts together; all ranks that share it take part."""
        cut = self.cuts.get(name)
        return value if cut is None else cut.whole(value)

    def shape(self, name: str, part: torch.Size) -> torch.Size:
        """Return the shape of a whole parameter, given that of its part."""
        cut = self.cuts.get(name)
        return part if cut is None else cut.shape


def join_cuts(parts: Sequence[StageCuts]) -> StageCuts:
    """Return the cuts of several parts of one model as one."""
    return replace(
        parts[0],
        cuts={name: cut for part in parts for name, cut in part.cuts.items()},
        partial=frozenset().union(*(part.partial for part in parts)),
    )
