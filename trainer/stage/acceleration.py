"""Puts faster parts into a stage: `kernels = "auto"` on a GPU. What it computes stays the same.

Each part has a plain twin that runs with `kernels = "torch"` and on CPU: transformers' and PEFT's
own modules, torch's attention under a mask, and the loss in torch.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer import devices
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.families.attention import INDEXED_TYPES
from headrace.trainer.layers import document_attention
from headrace.trainer.layers.experts import GroupedExperts
from headrace.trainer.layers.layer_functions import LayerFunctions, compiled
from headrace.trainer.layers.lora_layers import LoraLinear, swap_adapters
from headrace.trainer.layers.norms import faster_norm, swap_norms
from headrace.trainer.layers.rotary_attention import swap_attention
from headrace.trainer.layers.selective_checkpoint import layer_functions
from headrace.trainer.stage.spec import Acceleration, StageSpec

CAP, SINKS = "attn_logit_softcapping", "sink"  # as transformers 5.14 to 5.23 name them
SMALL_HEAD = 64
HOPPER = (9, 0)  # where cuDNN was seen to be faster on whole rows
CHANGE_MASKS = {"doge", *INDEXED_TYPES}  # model types whose attention computes with its mask
# types whose attention is Qwen 3's, though their models do not say what they hand on
HAND_ON = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}


def uses_kernels(config: ModelConfig, device: torch.device) -> bool:
    """Return whether the Triton kernels and compiled layers are used on this device."""
    return config.kernels != "torch" and devices.is_accelerator(device)


def runs_without_masks(architecture: Architecture, dtype: torch.dtype) -> bool:
    """Return whether the documents' bounds take the place of masks, on a GPU."""
    fits = hands_on_attention(architecture) and document_attention.fits(architecture.config)
    return fits and dtype != torch.float32


def hands_on_attention(architecture: Architecture) -> bool:
    """Return whether the layers give all that attention needs to one that is registered."""
    model_type = architecture.config.model_type
    if model_type in CHANGE_MASKS | HAND_ON:
        return model_type in HAND_ON
    known: Any = architecture.model_class._model_mapping  # private; of transformers 5.14 to 5.23
    return bool(known[type(architecture.model_config)]._supports_attention_backend)


def runs_compiled(
    layers: Iterable[nn.Module], config: ModelConfig, architecture: Architecture
) -> bool:
    """Return whether layers run compiled on a GPU.

    Experts that are looped over, and those that PEFT adapts, would be compiled again and again;
    of tiles the compiler may run several at once.
    """
    looped = any(is_looped(part) for layer in layers for part in layer.modules())
    return config.compile and architecture.family.compiles and not looped and config.tiles == 1


def is_looped(part: Any) -> bool:
    """Return whether a module is experts that are gone through one by one, or adapted by PEFT."""
    experts = hasattr(part, "gate_up_proj") and getattr(part, "num_experts", 0) > 1
    return isinstance(part, ParamWrapper) or (experts and not isinstance(part, GroupedExperts))


def accelerate(spec: StageSpec, config: ModelConfig, device: torch.device) -> Acceleration:
    """Swap faster parts into a stage's modules, whose weights are there, and return the others."""
    if not uses_kernels(config, device):
        return Acceleration()
    family, layers = spec.architecture.family, spec.layer_modules
    # A compiled recomputation keeps what a custom backward pass saves, here 13 GiB of an 8B Llama's
    adapters = [
        part
        for layer, again in zip(layers, spec.recomputed, strict=True)
        for part in swap_adapters(layer, may_join=not again and spec.weight_offload is None)
    ]
    compiles = runs_compiled(layers, config, spec.architecture)
    ours_inside = config.kernels == "triton"
    norm = spec.modules[spec.names.norm] if spec.names.norm else None
    faster = None if norm is None else faster_norm(norm, family.rms_norm)
    if ours_inside or not compiles:  # else the compiler makes kernels of its own
        for layer in layers:
            swap_norms(layer, family.rms_norm)
    by_bounds = runs_without_masks(spec.architecture, spec.compute_dtype)
    if by_bounds:
        attend_by_bounds(nn.ModuleList(layers))
        for layer in layers if ours_inside and family.llama_attention else ():
            swap_attention(layer, family.attention_module)
    if spec.tower is not None and spec.compute_dtype != torch.float32:
        spec.tower.accelerate(compiles=config.compile)
    plain = layer_functions(selective=spec.selective)
    return Acceleration(
        norm=faster,
        layer_functions=compiled_functions(plain) if compiles else None,
        before_step=partial(LoraLinear.refresh, adapters),
        by_bounds=by_bounds,
        in_blocks=by_bounds and prefers_blocks(layers, spec.architecture),
        by_rows=by_bounds and devices.compute_capability(device) == HOPPER,
        triton_loss=True,
    )


def compiled_functions(plain: LayerFunctions) -> LayerFunctions:
    """Return the same ways to run a layer, compiled."""
    return LayerFunctions(compiled(plain.plain), compiled(plain.checkpointed))


def prefers_blocks(layers: Iterable[nn.Module], architecture: Architecture) -> bool:
    """Return whether FlexAttention is to run: with soft-caps, with sinks and heads of 64, or where
    tokens of a picture see each other both ways.

    FlashAttention 2 knows no caps. Of sinks an H200 made 4.5 ms where FlexAttention took 3.6, and
    with a window 1.5 where it took 0.9.
    """
    if architecture.setting(CAP) or (architecture.vision and architecture.vision.two_way):
        return True
    names = (name for layer in layers for name, _ in layer.named_parameters())
    size = getattr(architecture.config, "head_dim", None)
    return size == SMALL_HEAD and any(SINKS in name for name in names)


def attend_by_bounds(tree: nn.Module) -> None:
    """Let layers attend within the documents' bounds, without masks."""
    for part in tree.modules():  # transformers 5.14 to 5.23 look it up here at each call
        part_config: Any = getattr(part, "config", None)
        if part_config is not None:
            part_config._attn_implementation = document_attention.NAME
