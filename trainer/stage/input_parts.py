"""Modules of a stage between its embedding and its first layer."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class InputParts:
    """Modules of a model between its embedding and first layer; see `families.ends.Ends`."""

    projection: nn.Module | None = None
    positions: nn.Module | None = None
    by_name: bool = False
    norm: nn.Module | None = None

    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return what comes of rows of the embedding, at positions [b, s] in their documents."""
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.positions is not None:
            named = {"position_ids": positions} if self.by_name else {}
            hidden = hidden + self.positions(positions, **named).to(hidden.dtype)
        return hidden if self.norm is None else self.norm(hidden)
