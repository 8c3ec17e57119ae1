"""Attention inside pictures by their bounds, for towers that are given these as `cu_seqlens`.

An attention of transformers with "flash" in its name, by which its towers hand on the bounds in
place of running each window of a picture for itself (Qwen2.5-VL: 140 for two pictures of 1,024 x
768, in 28 layers), and waiting for the device in each layer to know their lengths. Read against
transformers 5.17 and 5.23.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from headrace.kernels.attention.document_attention import (
    BOTH_WAYS,
    HEAD_SIZES,
    document_attention,
)

NAME = "headrace_flash_pictures"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' towers call it: [1, heads, s, size] to [1, s, heads, size]."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = document_attention(
        *(query, key, value, cu_seq_lens_q, max_length_q), scale=scaling, window=BOTH_WAYS
    )
    return output.unsqueeze(0), None


def bounds_of(grid: Tensor, tower: Any) -> dict[str, Tensor | int]:
    """Return all that a tower makes of its pictures' grid, under transformers' names for it.

    Args:
        grid: [pictures, 3] patches in time, down and across, on the host, as what is made of it.
    """
    config = tower.config
    bounds = get_vision_cu_seqlens(grid)
    made: dict[str, Tensor | int] = {
        "position_ids": get_vision_position_ids(grid, config.spatial_merge_size),
        "cu_seqlens": bounds,
        "max_seqlen": longest(bounds),
    }
    if hasattr(config, "window_size"):
        index, windows = get_vision_window_index(
            grid, config.spatial_merge_size, config.window_size, config.patch_size
        )
        made |= {
            "window_index": index,
            "cu_window_seqlens": windows,
            "max_window_seqlen": longest(windows),
        }
    if hasattr(config, "num_position_embeddings"):
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            int(config.num_position_embeddings**0.5),
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
        )
        made |= {"interp_indices": indices, "interp_weights": weights}
    return made


def takes(tower: nn.Module) -> bool:
    """Return whether the kernels know the size of a tower's heads."""
    config: Any = tower.config
    width = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL's own is the first
    return width // config.num_heads in HEAD_SIZES


def attend_by_bounds(tower: nn.Module) -> None:
    """Let a tower's layers attend within bounds; transformers looks the name up at each call."""
    for part in tower.modules():
        config: Any = getattr(part, "config", None)
        if config is not None:
            config._attn_implementation = NAME


def compile_layers(tower: nn.Module) -> None:
    """Compile each layer of a tower, for any number of patches."""
    for part in tower.modules():
        if isinstance(part, GradientCheckpointingLayer):
            part.compile(dynamic=True)


def longest(bounds: Tensor) -> int:
    """Return the size of the largest part between bounds."""
    return int((bounds[1:] - bounds[:-1]).max())


AttentionInterface.register(NAME, attend)
