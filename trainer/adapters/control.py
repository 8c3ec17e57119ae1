"""Control adapters: each decoder layer's change of the hidden states, stretched along directions.

With d = layer(h) - h and class c of a token, a layer gives layer(h) + Q diag(exp(c S) - 1) Q^T d.
As long as Q^T Q = I, class -1 is the exact inverse of class 1, and class 0 changes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.publish import write_atomic
from headrace.schemas.train.adapter_config import GAMMA, AdapterConfig
from headrace.trainer.adapters.method import TuningMethod, decoder_layers
from headrace.trainer.adapters.names import CONTROL
from headrace.trainer.adapters.targets import adapter_layers
from headrace.trainer.architecture.model_writer import save_tensors

NEWTON_STEPS = 3  # from an error of 0.2 to one of 1e-7
TENSORS_NAME, RECORD_NAME = "control_adapter.safetensors", "control_adapter.json"
SETTINGS = {"kind", "rank", "layers"}
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


class ControlTuning(TuningMethod):
    """An adapter of each decoder layer over a frozen model."""

    in_halves = False
    beside_hidden = False

    def install(self, model: nn.Module) -> nn.Module:
        config = self.architecture.config
        if self.config.rank > config.hidden_size:
            raise ConfigError(
                f"adapter.rank: {self.config.rank} directions cannot be orthonormal in hidden "
                f"states of {config.hidden_size}; use at most {config.hidden_size}"
            )
        wanted = adapter_layers(self.config, self.architecture.layers)
        model.requires_grad_(False)
        layers = decoder_layers(self.architecture, model)
        add_control_adapters(layers, wanted, config.hidden_size, self.config)
        return model

    def adapters(self, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, ControlAdapter]]:
        return control_adapters(modules)

    def initial_values(self, name: str, adapted: nn.Module) -> dict[str, Tensor]:
        assert isinstance(adapted, ControlAdapter)
        return initial_control(name, adapted, self.seed)

    def after_step(self, modules: Mapping[str, nn.Module], lr: float) -> None:
        for _, adapter in control_adapters(modules):
            regularize(adapter, self.config.gamma, lr * self.config.control_decay)

    def write(self, directory: Path, tensors: dict[str, Tensor], width: int, base: Path) -> None:
        """Write one file of tensors, and the settings that they were made by.

        Not in PEFT's format, which has none for them.
        """
        save_tensors(tensors, directory / TENSORS_NAME, {"format": "pt"})
        record = {"base_model": self.model, **self.config.model_dump(include=SETTINGS)}
        write_atomic(directory / RECORD_NAME, json.dumps(record, indent=1) + "\n")


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


def initial_control(name: str, adapter: ControlAdapter, seed: int) -> dict[str, Tensor]:
    """Random orthonormal directions and no stretch: the same in every layout."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    directions = torch.empty(adapter.directions.shape)
    nn.init.orthogonal_(directions, generator=generator)
    return {DIRECTIONS: directions, STRETCHES: torch.zeros(adapter.log_stretches.shape)}


def control_adapters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, ControlAdapter]]:
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
