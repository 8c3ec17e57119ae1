"""Arguments that a decoder layer is called with, read from its signature."""

import inspect
from typing import Any

from torch import nn


class LayerArguments:
    """Arguments that a layer takes, by its signature."""

    def __init__(self, layer: nn.Module) -> None:
        parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
        named = [part for part in parameters if part.kind is part.POSITIONAL_OR_KEYWORD]
        self.names = {part.name for part in named}
        self.required = [part.name for part in named if part.default is part.empty]
        self.takes_any = any(part.kind is part.VAR_KEYWORD for part in parameters)

    def select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that the layer takes, and None for what it insists on
        beside them, such as falcon's alibi.
        """
        given = {k: v for k, v in arguments.items() if self.takes_any or k in self.names}
        return dict.fromkeys(self.required) | given
