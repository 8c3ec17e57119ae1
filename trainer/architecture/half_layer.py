"""Half a decoder layer: its attention, or its MLP. A stage may end between the two.

Both add what they compute to the hidden states. The half that a stage lacks adds nothing, so that
the layer's own forward pass, which knows multipliers and norms, serves for either.
"""

import copy
from typing import Any, Literal

from torch import Tensor, nn

Half = Literal["attention", "mlp"]
ATTENTION = "self_attn"


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


def half_of(layer: nn.Module, attention: tuple[str, ...], half: Half) -> nn.Module:
    """A layer with only the modules of one half, which it shares with the whole.

    Args:
        attention: names of the modules that belong to the attention.
    """
    other = copy.copy(layer)
    other._modules = {
        name: module
        if (name in attention) == (half == "attention")
        else Absent(attends=name == ATTENTION)
        for name, module in layer.named_children()
    }
    return other
