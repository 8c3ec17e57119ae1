"""MLPs that go over a tile of the tokens at a time, whose results alone are then in memory.

Each tile keeps its input and is run again in the backward pass. The head's loss goes over tiles of
its own, see `CHUNK_LOGITS`. Source: https://arxiv.org/abs/2506.13996
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headrace.trainer.architecture.half_layer import Absent

NAMES = ("mlp", "feed_forward")  # of a layer's MLP, in families of transformers 5.14 to 5.23


class TileByTile(nn.Module):
    """Base, before an MLP's own class, that runs it over tiles of the tokens."""

    tiles: int
    keeps_chance: bool  # dropout is drawn again

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, s, width] to the same."""
        run = super().forward
        if torch.is_grad_enabled():
            run = partial(
                checkpoint, run, use_reentrant=False, preserve_rng_state=self.keeps_chance
            )
        return torch.cat([run(part) for part in hidden_states.tensor_split(self.tiles, dim=1)], 1)


@cache
def tiling(kind: Any) -> Any:
    """Return the subclass of an MLP's class that goes tile by tile."""
    return type(kind.__name__, (TileByTile, kind), {})


def tile_mlps(layers: Sequence[nn.Module], tiles: int, *, keeps_chance: bool) -> int:
    """Let the MLPs of layers go over so many tiles, in place; return how many layers have one.

    Args:
        keeps_chance: there is dropout in them.
    """
    found = [mlp for layer in layers if (mlp := dense_mlp(layer)) is not None]
    for mlp in found:
        if not isinstance(mlp, TileByTile):
            kind: Any = type(mlp)
            mlp.__class__ = tiling(kind)
        mlp.tiles, mlp.keeps_chance = tiles, keeps_chance
    return len(found)


def dense_mlp(layer: nn.Module) -> Any:
    """Return the MLP that all tokens of a layer go through; None where there are experts."""
    children = dict(layer.named_children())
    found = next((children[name] for name in NAMES if name in children), None)
    if found is None or isinstance(found, Absent):
        return None
    inside = {part for name, _ in found.named_modules() for part in name.split(".")}
    return None if "experts" in inside else found
