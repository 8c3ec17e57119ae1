"""Pictures of a micro-batch, and which stage is given them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

GRID = "image_grid_thw"  # an argument of towers that stays on the host, where it is read


@dataclass(frozen=True)
class VisionInputs:
    """Pictures of one micro-batch of b sequences of s tokens.

    Attributes:
        positions: [3, b, s] int32, where rotary positions have three axes.
        groups: [b, s] int32 groups of tokens that see each other both ways, -1 for none.
        arguments: of the tower; on the stage that holds it only, and empty without pictures.
        places: [n] int64 where its features belong, as numbers in the b * s tokens; likewise.
    """

    positions: Tensor | None = None
    groups: Tensor | None = None
    arguments: Mapping[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None

    def of_stage(self, *, first: bool) -> "VisionInputs":
        """Return what a stage is sent of it."""
        return self if first else replace(self, arguments={}, places=None)

    def through(self, move: Callable[[Tensor], Tensor]) -> "VisionInputs":
        """Return it with each tensor moved but the grid."""
        return VisionInputs(
            None if self.positions is None else move(self.positions),
            None if self.groups is None else move(self.groups),
            {k: v if k == GRID else move(v) for k, v in self.arguments.items()},
            None if self.places is None else move(self.places),
        )
