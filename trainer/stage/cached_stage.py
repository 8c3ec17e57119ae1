"""A stage that goes through rows of text piece by piece, with the keys and values seen so far.

Layers, adapters and quantized weights are the stage's own; it runs them as they are, without what
is compiled for training. Read against transformers 5.14 to 5.23.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.families.attention import Chunk
from headrace.trainer.layers.attention_mask import additive_mask
from headrace.trainer.layers.device import to_device
from headrace.trainer.layers.layer_functions import run_layer
from headrace.trainer.layers.rotary_tables import rotary_tables
from headrace.trainer.stage.stage import Masks, Stage
from headrace.trainer.stage.stream import States

# of the argument of transformers' layers
REJECTED = "[rejected_sampling]"
CACHE_NAMES = ("past_key_values", "layer_past", "cache_params")


class CachedStage:
    """One batch of rows in one stage, which must be in evaluation mode.

    Args:
        padding: [b] columns of padding before each row, so that all rows end together.
        longest: [b] tokens that each row may come to; what it goes on with has its last position.
    """

    def __init__(self, stage: Stage, padding: list[int], longest: list[int]) -> None:
        self.stage = stage
        self.cache_name = cache_name(stage.layers[0])
        self.cache = new_cache(stage)  # whole, whatever the windows; masks keep them
        self.handed_over = HandedOver()
        self.columns = 0  # gone through
        self.padding, self.longest = torch.tensor(padding), torch.tensor(longest)

    @torch.no_grad()
    def run(self, inputs: Tensor) -> Tensor:
        """The next columns.

        Args:
            inputs: [b, columns] ids at the first stage, else [b, columns, hidden size].

        Returns:
            [b, columns, hidden size], after the last stage's norm.
        """
        stage, device = self.stage, inputs.device
        start, self.columns = self.columns, self.columns + inputs.shape[1]
        padding = to_device(self.padding, device).unsqueeze(1)
        last = to_device(self.longest, device).unsqueeze(1) - 1
        columns = torch.arange(start, self.columns, device=device)
        positions = (columns - padding).clamp(min=0).minimum(last)
        windows = set(stage.attention_windows)
        plain = {window: self._mask(start, padding, window) for window in windows}
        masks, further = self._with_biases(plain, len(padding))
        real = columns >= padding if padding.any() else None
        with torch.autocast(device.type, stage.compute_dtype, enabled=stage.autocast):
            if stage.embedding is not None:
                embedded = stage.embedding.embed(inputs, positions, None, device)
                hidden, carried = stage.stream.begin(embedded, inputs)
            else:
                hidden, carried = stage.stream.split(inputs)
                carried.shared = self.handed_over.joined(carried.shared)
            tables = rotary_tables(stage.rotary, stage.rotary_types, hidden, positions, None)
            for index, (layer, window, kind) in enumerate(
                zip(stage.layers, stage.windows, stage.rotary_types, strict=True)
            ):
                if stage.weight_offload is not None:
                    stage.weight_offload.bring(index)
                mask, table = masks.get(window), tables.get(kind)
                number = stage.numbers[index]
                beside = further | carried.arguments(number)
                arguments = stage.arguments_of_layer(index, mask, positions, table, real, beside)
                hidden = run_layer(layer, hidden, arguments | {self.cache_name: self.cache})
                carried.take(number, arguments)
            carried.shared = newest(carried.shared, inputs.shape[1])
            hidden = stage.ended(hidden, carried)
        return hidden

    def _with_biases(self, masks: Masks, rows: int) -> tuple[Masks, dict[str, Any]]:
        """Return masks as the family's layers want them, and what else these are given.

        Biases by distance go by columns: all rows end together, and what a row's biases have in
        common a softmax does not see.
        """
        if self.stage.biases is None:
            return masks, {}
        columns = torch.arange(self.columns, device=self.stage.device).expand(rows, -1)
        return self.stage.with_masks(masks, columns, self.columns)

    def _mask(self, start: int, padding: Tensor, window: int | None) -> Tensor:
        """[b, 1, columns, columns so far], as `attention_masks` makes them.

        Padding sees itself: a softmax over nothing would not be a number, and spread from there.
        """
        device = padding.device
        keys = torch.arange(self.columns, device=device)
        queries = torch.arange(start, self.columns, device=device).unsqueeze(1)
        near = keys <= queries
        if isinstance(window, Chunk):
            own, seen = ((at - padding.unsqueeze(1)) // int(window) for at in (queries, keys))
            near = near & (own == seen)
        elif window is not None:
            near = near & (keys > queries - window)
        mask = (near & (keys >= padding.unsqueeze(1))) | (keys == queries)
        mask = mask.unsqueeze(1)
        dtype = self.stage.compute_dtype
        return additive_mask(mask, dtype) if self.stage.additive_mask else mask


class HandedOver:
    """Keys and values that layers of earlier stages share, of all columns so far."""

    def __init__(self) -> None:
        self._shared: dict[str, States] = {}

    def joined(self, new: dict[str, States]) -> dict[str, States]:
        """Return those of all columns, by kind.

        Args:
            new: [b, heads, columns, size] each, of the next columns.
        """
        for kind, (keys, values) in new.items():
            if kind in self._shared:
                earlier = self._shared[kind]
                keys, values = torch.cat([earlier[0], keys], 2), torch.cat([earlier[1], values], 2)
            self._shared[kind] = (keys, values)
        return dict(self._shared)


def newest(shared: dict[str, States], columns: int) -> dict[str, States]:
    """Return the last columns of keys and values, which is what the next stage lacks."""
    return {
        kind: (keys[:, :, -columns:], values[:, :, -columns:])
        for kind, (keys, values) in shared.items()
    }


def new_cache(stage: Stage) -> Cache:
    """Return an empty cache with a place for each layer of the model up to the stage's last."""
    if stage.states is None:
        return DynamicCache()
    places: list[Any] = [DynamicLayer() for _ in range(stage.numbers[-1] + 1)]
    beside = stage.states.attends
    for number, stateful in zip(stage.numbers, stage.stateful, strict=True):
        if stateful:
            kind = LinearAttentionAndFullAttentionLayer if beside else LinearAttentionLayer
            places[number] = kind()
    return Cache(layers=places)


def cache_name(layer: nn.Module, asked: str = REJECTED) -> str:
    """Return the name of a decoder layer's cache argument.

    Args:
        asked: what asks for answers, for messages.

    Raises:
        ConfigError: it takes none.
    """
    parameters = inspect.signature(layer.forward).parameters
    found = [name for name in CACHE_NAMES if name in parameters]
    if not found:
        raise ConfigError(
            f"{asked}: {type(layer).__name__} keeps no keys and values, without which nothing can "
            "be generated; drop it"
        )
    return found[0]


def check_generates(
    stage: Stage, architecture: Architecture, tokens: int, asked: str = REJECTED
) -> None:
    """Check that texts of so many tokens can be generated.

    Args:
        asked: what asks for answers, for messages.

    Raises:
        ConfigError: layers keep no keys, or rotary frequencies change, so that kept keys go wrong.
    """
    cache_name(stage.layers[0], asked)
    if stage.states is not None and not stage.states.cached:
        raise ConfigError(
            f"{asked}: {architecture.config.model_type} keeps the states of its layers "
            "outside of transformers' cache, and is not generated with; drop it"
        )
    steady = architecture.steady_rotary_tokens
    if steady is not None and tokens > steady:
        raise ConfigError(
            f"{asked}: texts of up to {tokens} tokens, but the model's rotary frequencies change "
            f"beyond {steady}; make them shorter, or drop it"
        )
