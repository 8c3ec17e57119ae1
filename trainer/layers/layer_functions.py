"""Ways to run one decoder layer: once, or again for the backward pass; compiled or not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Forms of a layer's code before torch gives up compiling: training and evaluation, packed rows and
# single documents, for each kind of layer.
FORMS = 64

LayerFunction = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class LayerFunctions:
    """`plain` keeps what the backward pass needs; `checkpointed` little more than the input."""

    plain: LayerFunction
    checkpointed: LayerFunction


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """One decoder layer as it is."""
    output = layer(hidden, **arguments)
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def run_layer_checkpointed(
    layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]
) -> Tensor:
    """One decoder layer that keeps its input only, and is run again for the backward pass."""
    run = partial(run_layer, layer, arguments=arguments)
    output: Tensor = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
    return output


def compiled(
    function: LayerFunction, backend: str | Callable[..., Any] = "inductor"
) -> LayerFunction:
    """Compile once for all layers of a kind, whatever the documents of a micro-batch.

    With the recomputation inside, the compiler leaves out what the backward pass does not need of
    it, such as the last matrix product of the layer.
    """
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    faster: LayerFunction = torch.compile(function, dynamic=False, backend=backend)
    return faster
