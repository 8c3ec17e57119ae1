"""Rows of the embedding and the head that are trained, beside all others that are frozen.

They take the place of the frozen ones. Modules and parameters have the names that PEFT's
`trainable_token_indices` gives them; PEFT forms the whole weight with these rows in each step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.names import ADAPTER, ROWS


class RowAdapter(nn.Module):
    """The frozen module, and the rows that are trained in place of its own.

    Args:
        tokens: ids of the rows, in order.
    """

    def __init__(self, base_layer: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tokens = list(tokens)
        width = weight_shape(base_layer)[1]
        rows = nn.Parameter(torch.empty(len(self.tokens), width, device="meta"))
        self.trainable_tokens_delta = nn.ParameterDict({ADAPTER: rows})
        self._ids: dict[torch.device, Tensor] = {}

    def initial_values(self) -> dict[str, Tensor]:
        """Return the frozen rows, which training starts from, by name below this module."""
        weight: Any = getattr(self.base_layer, "weight", None)
        if weight is None:  # held quantized
            weight = self.base_layer.dequantized("weight")  # type: ignore[operator]
        rows = weight.detach()[self.ids(weight.device)]
        return {f"{ROWS}.{ADAPTER}": rows.clone()}

    def merge(self) -> None:
        """Put the trained rows in the place of the frozen ones."""
        weight: Any = self.base_layer.weight
        ids = self.ids(weight.device)
        rows = self.trainable_tokens_delta[ADAPTER].data.to(weight)
        weight.data = weight.data.index_copy(0, ids, rows)

    def ids(self, device: torch.device) -> Tensor:
        """Return the ids of the rows on a device."""
        if device not in self._ids:
            self._ids[device] = torch.tensor(self.tokens, device=device)
        return self._ids[device]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the module does, with the trained rows in place of the frozen ones."""
        rows = self.trainable_tokens_delta[ADAPTER]
        output: Tensor = self.base_layer(inputs)
        ids = self.ids(inputs.device)
        if isinstance(self.base_layer, nn.Linear):
            own = functional.linear(inputs, rows.to(inputs.dtype))
            return output.index_copy(-1, ids, own.to(output.dtype))
        places = torch.searchsorted(ids, inputs).clamp(max=len(ids) - 1)
        found = ids[places] == inputs
        own = functional.embedding(places, rows).to(output.dtype)
        scale = getattr(self.base_layer, "embed_scale", None)  # as Gemma's own has
        if scale is not None:
            own = own * scale.to(own.dtype)
        return torch.where(found.unsqueeze(-1), own, output)


class TokenRows(nn.Module):
    """Wrapper of an embedding or a head, as PEFT has one around what it trains."""

    def __init__(self, module: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.token_adapter = RowAdapter(module, tokens)

    @property
    def out_features(self) -> int:
        """Return the number of logits of a head."""
        return weight_shape(self.token_adapter.base_layer)[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the adapted module does."""
        output: Tensor = self.token_adapter(inputs)
        return output


def weight_shape(module: nn.Module) -> torch.Size:
    """Return the shape of an embedding's or a head's weight, [vocabulary, hidden size]."""
    shape: Any = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
    width: Any = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
    return torch.Size((shape, width))


def add_token_rows(wrapped: nn.Module, paths: Sequence[str], tokens: Sequence[int]) -> None:
    """Put trained rows on the modules at some paths of a model; in place.

    Raises:
        ConfigError: a module has an adapter already, or no such rows.
    """
    for path in paths:
        module = wrapped.get_submodule(path)
        known = isinstance(module, nn.Embedding | nn.Linear)
        if not known or getattr(module, "bias", None) is not None:
            raise ConfigError(
                f"adapter.trainable_token_indices: {path} is a {type(module).__name__}; rows are "
                "trained of an embedding and a head without bias that nothing else trains"
            )
        size = weight_shape(module)[0]
        if max(tokens) >= size:
            raise ConfigError(
                f"adapter.trainable_token_indices: {max(tokens)}, but {path} has {size} rows"
            )
        wrapped.set_submodule(path, TokenRows(module, tokens))


def row_adapters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, RowAdapter]]:
    """Yield the trained rows below named modules, with their names in the whole model."""
    for prefix, module in modules.items():
        if isinstance(module, TokenRows):
            yield f"{prefix}.token_adapter", module.token_adapter
