"""Control adapters: each decoder layer's change of the hidden states, stretched along directions.

With d = layer(h) - h and class c of a token, a layer gives layer(h) + Q diag(exp(c S) - 1) Q^T d.
As long as Q^T Q = I, class -1 is the exact inverse of class 1, and class 0 changes nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.adapter_config import GAMMA, AdapterConfig

NEWTON_STEPS = 3  # from an error of 0.2 to one of 1e-7
CONTROL = "control_adapter"  # name of the adapter in its decoder layer
DIRECTIONS, STRETCHES = "directions", "log_stretches"


class ControlAdapter(nn.Module):
    """The adapter of one decoder layer.

    Attributes:
        directions: Q, [hidden size, rank], orthonormal columns.
        log_stretches: S, [rank]; 0 changes nothing.
    """

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.empty(hidden_size, rank, device="meta"))
        self.log_stretches = nn.Parameter(torch.empty(rank, device="meta"))
        self.dropout = nn.Dropout(dropout)

    def forward(self, before: Tensor, after: Tensor, classes: Tensor) -> Tensor:
        """Return the layer's output with the adapter applied.

        Args:
            before, after: [b, s, hidden size] hidden states that went into the layer and came out.
            classes: [b, s] -1, 0 or 1.
        """
        change = self.dropout((after - before).to(self.directions.dtype))
        exponents = classes.to(change.dtype).unsqueeze(-1) * self.log_stretches
        along = (change @ self.directions) * torch.expm1(exponents)
        return after + (along @ self.directions.T).to(after.dtype)


def add_control_adapters(
    layers: nn.Module, wanted: list[int] | None, hidden_size: int, config: AdapterConfig
) -> None:
    """Give decoder layers an adapter, without memory yet.

    Args:
        wanted: numbers of layers; None is all.
    """
    for index, layer in enumerate(layers.children()):
        if wanted is None or index in wanted:
            layer.add_module(CONTROL, ControlAdapter(hidden_size, config.rank, config.dropout))


def is_control(name: str) -> bool:
    """Return whether a parameter belongs to a control adapter."""
    return f".{CONTROL}." in f".{name}"


def initial_control(name: str, adapter: ControlAdapter, seed: int) -> dict[str, Tensor]:
    """Random orthonormal directions and no stretch: the same in every layout."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    directions = torch.empty(adapter.directions.shape)
    nn.init.orthogonal_(directions, generator=generator)
    return {DIRECTIONS: directions, STRETCHES: torch.zeros(adapter.log_stretches.shape)}


def control_adapters(modules: dict[str, nn.Module]) -> Iterator[tuple[str, ControlAdapter]]:
    """Yield all adapters below named modules, with their names in the whole model."""
    for prefix, module in modules.items():
        adapter = getattr(module, CONTROL, None)
        if adapter is not None:
            yield f"{prefix}.{CONTROL}", adapter


@torch.no_grad()
def regularize(adapter: ControlAdapter, gamma: float, shrinkage: float) -> None:
    """Move directions towards orthonormal ones and stretches towards none, after an optimizer step.

    Q <- Q - gamma Q (Q^T Q - I) and S <- (1 - shrinkage) S. With gamma = 1/2 that is a Newton step,
    and as many follow as make Q orthonormal to rounding; else the inverse would be as far off as Q.
    """
    directions = adapter.directions
    for _ in range(NEWTON_STEPS if gamma == GAMMA else 1):
        gram = directions.T @ directions
        gram.diagonal().sub_(1)
        directions.sub_(directions @ gram, alpha=gamma)
    adapter.log_stretches.mul_(1 - shrinkage)
