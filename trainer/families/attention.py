"""Kinds of attention that config.json names by layer, and what their layers are given."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, arange

from headrace.schemas.errors import ConfigError

INDEXED = "indexed_attention"  # an index chooses among earlier tokens; see `limits`
CHUNKED = "chunked_attention"
ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", CHUNKED})
INDEXED_TYPES = frozenset({"axk2", "deepseek_v32", "glm_moe_dsa"})  # that have been compared
CHOSEN = "prev_topk_indices"  # argument of layers that take over another layer's choice


class Chunk(int):
    """Tokens of a chunk of a document; a token attends to earlier ones of its chunk alone.

    It takes the place of a window, and is equal to none.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunk) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Chunk, int(self)))

    def documents(self, lengths: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the lengths of all chunks of rows of documents of these lengths."""
        size = int(self)
        return [
            [part for length in row for part in [size] * (length // size) + [length % size] if part]
            for row in lengths
        ]


def window_of(config: Any, kind: str) -> int | None:
    """Return how far back a layer of a kind attends; None is to the start."""
    if kind == CHUNKED:
        if not config.attention_chunk_size:
            raise ConfigError(
                f"layer_types has {CHUNKED}, and attention_chunk_size = "
                f"{config.attention_chunk_size} gives no chunks; set it, or name full_attention"
            )
        return Chunk(config.attention_chunk_size)
    window = getattr(config, "sliding_window", None) or None
    return window if kind == "sliding_attention" else None


def known_types(config: Any) -> frozenset[str]:
    """Return the kinds of attention that layers of a model may have."""
    indexed = config.model_type in INDEXED_TYPES
    return ATTENTION_TYPES | {INDEXED} if indexed else ATTENTION_TYPES


def is_indexed(config: Any) -> bool:
    """Return whether an index chooses the tokens that some layers attend to."""
    return INDEXED in (getattr(config, "layer_types", None) or ())


def all_chosen(positions: Tensor) -> dict[str, Tensor]:
    """Return the choice of all tokens, [b, s, s], for layers that take over another layer's.

    Args:
        positions: [b, s], for their shape and device.
    """
    rows, tokens = positions.shape
    return {CHOSEN: arange(tokens, device=positions.device).expand(rows, tokens, tokens)}


def layer_count(config: Any) -> int:
    """Return how many decoder layers a model has: of LongCat's, `num_hidden_layers` counts two."""
    key = "num_layers" if config.model_type == "longcat_flash" else "num_hidden_layers"
    return int(getattr(config, key))
