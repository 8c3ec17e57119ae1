"""Parallel dimensions of a run: how many processes lie along each, and which rank stands where."""

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from headrace.schemas.errors import ConfigError

# axes from the outermost, whose ranks are far from each other, to the innermost
ORDERS = {
    "stages": ("replica", "stage", "sequence", "tensor"),
    "replicas": ("stage", "replica", "sequence", "tensor"),
}


class Coordinates(NamedTuple):
    """Place of a rank along each axis."""

    stage: int = 0
    replica: int = 0
    sequence: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes; the number of processes is their product.

    Args:
        neighbors: of which axis consecutive ranks are: a replica's stages, or a stage's replicas.

    Raises:
        ConfigError: a size that is not possible.
    """

    stages: int = 1
    replicas: int = 1
    sequence: int = 1
    tensor: int = 1
    neighbors: Literal["stages", "replicas"] = "stages"

    def __post_init__(self) -> None:
        for axis, size in self.sizes._asdict().items():
            if size < 1:
                raise ConfigError(f"{axis} ranks = {size}: each parallel dimension has 1 or more")

    @classmethod
    def of(
        cls,
        processes: int,
        *,
        stages: int,
        sequence: int = 1,
        tensor: int = 1,
        neighbors: Literal["stages", "replicas"] = "stages",
    ) -> "ParallelDims":
        """Return the dimensions of a run of so many processes; what the rest leaves are replicas.

        Raises:
            ConfigError: the ranks of a replica do not divide the processes.
        """
        ranks = stages * sequence * tensor
        if processes % ranks:
            cut = f"pipeline_stages = {stages}"
            if sequence > 1:
                cut += f" times sequence_parallel = {sequence}"
            if tensor > 1:
                cut += f" times tensor_parallel = {tensor}"
            raise ConfigError(
                f"{cut} does not divide the {processes} processes; launch a multiple of {ranks}"
            )
        return cls(
            stages=stages,
            replicas=processes // ranks,
            sequence=sequence,
            tensor=tensor,
            neighbors=neighbors,
        )

    @property
    def sizes(self) -> Coordinates:
        return Coordinates(self.stages, self.replicas, self.sequence, self.tensor)

    @property
    def world(self) -> int:
        """Return the number of processes."""
        return self.stages * self.replicas * self.sequence * self.tensor

    @property
    def axes(self) -> dict[str, int]:
        """Return the size of each axis by name, from the outermost to the innermost."""
        return {axis: getattr(self.sizes, axis) for axis in ORDERS[self.neighbors]}

    @property
    def ranks(self) -> np.ndarray:
        """Return all ranks as [stage, replica, sequence, tensor]."""
        axes = list(self.axes)
        by_order = np.arange(self.world).reshape(tuple(self.axes.values()))
        return by_order.transpose([axes.index(axis) for axis in Coordinates._fields])

    def rank(self, place: Coordinates) -> int:
        """Return the rank that stands at a place."""
        return int(self.ranks[place])

    @property
    def copies(self) -> list[list[int]]:
        """Return the ranks that hold the same weights, in order: a list for each part of them."""
        held = self.ranks.transpose(0, 3, 1, 2)
        lists: list[list[int]] = held.reshape(-1, self.replicas * self.sequence).tolist()
        return lists

    def places(self, replica: int) -> list[Coordinates]:
        """Return all places of a replica; that of its data leader is the first."""
        counts = (range(self.stages), [replica], range(self.sequence), range(self.tensor))
        return [Coordinates(*place) for place in product(*counts)]

    @property
    def whole_replicas(self) -> list[list[int]]:
        """Return the ranks of each replica, in ascending order."""
        held = self.ranks.transpose(1, 0, 2, 3).reshape(self.replicas, -1)
        return [sorted(ranks) for ranks in held.tolist()]

    def lines(self, axis: str) -> list[list[int]]:
        """Return the ranks along an axis, in its order: a list for each place on the others."""
        moved = np.moveaxis(self.ranks, Coordinates._fields.index(axis), -1)
        lines: list[list[int]] = moved.reshape(-1, moved.shape[-1]).tolist()
        return lines
