"""Half a decoder layer: its attention, or its MLP. A stage may end between the two.

Both add what they compute to the hidden states. The half that a stage lacks adds nothing, so that
the layer's own forward pass, which knows multipliers and norms, serves for either.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from headrace.trainer.architecture.families import Family

Half = Literal["attention", "mlp"]


class Absent(nn.Module):
    """Placeholder for a module that another stage has. What follows it adds zero.

    Args:
        attends: attention returns its weights beside the states, here None.
    """

    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends

    def forward(self, *states: Tensor, **named: Any) -> Tensor | tuple[Tensor, None]:
        hidden = states[0] if states else named["hidden_states"]
        nothing = hidden.new_zeros(())
        return (nothing, None) if self.attends else nothing


def half_of(layer: nn.Module, family: Family, half: Half) -> nn.Module:
    """A layer with only the modules of one half, which it shares with the whole."""
    other = copy.copy(layer)
    other._modules = {
        name: module
        if (name in family.attention) == (half == "attention")
        else Absent(attends=name == family.attention_module)
        for name, module in layer.named_children()
    }
    return other


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

        if not self.pieces():
            return "none"
        first, *others = map(name, self.pieces())
        return f"{first}-{others[-1]}" if others else first
