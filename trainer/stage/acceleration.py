"""Puts faster parts into a stage: `kernels = "auto"` on a GPU. What it computes stays the same.

Each part has a plain twin that runs with `kernels = "torch"` and on CPU: transformers' and PEFT's
own modules, torch's attention under a mask, and the loss in torch.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headrace.kernels.lora_linear import join, joined_lora_linear, lora_linear
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.layers import document_attention
from headrace.trainer.layers.experts import GroupedExperts
from headrace.trainer.layers.layer_functions import LayerFunctions, compiled
from headrace.trainer.layers.norms import faster_norm, swap_norms
from headrace.trainer.layers.rotary_attention import swap_attention
from headrace.trainer.stage.spec import Acceleration, StageSpec

CHANGE_MASKS = {"doge"}  # model types whose attention computes with its mask
ADAPTER = "default"  # the only one that a run trains
WIDE = 2  # outputs over inputs from which adapter and frozen weight are multiplied as one


class LoraLinear(nn.Module):
    """A PEFT LoRA layer's parts under the same names, computed in the type of the input.

    A frozen weight of a wide layer lies beside its adapter's B in one matrix, `joined`; `refresh`
    brings that copy of B up to date before a step.
    """

    joined: Tensor | None

    def __init__(self, layer: PeftLinear, *, may_join: bool) -> None:
        super().__init__()
        self.base_layer: Any = layer.base_layer
        self.lora_A = layer.lora_A
        self.lora_B = layer.lora_B
        self.dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
        self.scale = layer.scaling[ADAPTER]
        base = self.base_layer
        joins = may_join and is_wide(base) and self.dropout == 0
        joined = join(base.weight.data, layer.r[ADAPTER]) if joins else None
        self.register_buffer("joined", joined, persistent=False)
        if joined is not None:
            base.weight.data = joined[:, : base.in_features]  # the same values, held once

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        if self.joined is not None:
            return joined_lora_linear(x, self.joined, a, b, self.scale)
        return lora_linear(
            functional.dropout(x, self.dropout, self.training),
            self.base_layer(x),
            a,
            b,
            self.scale,
        )

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for modules that look at it."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, likewise."""
        bias: Tensor | None = self.base_layer.bias
        return bias

    @staticmethod
    @torch.no_grad()
    def refresh(layers: Sequence["LoraLinear"]) -> None:
        """Copy every B, scaled, to its place beside the frozen weight."""
        joined = [(layer, layer.joined) for layer in layers if layer.joined is not None]
        if joined:
            scaled = [layer.lora_B[ADAPTER].weight * layer.scale for layer, _ in joined]
            places = [matrix[:, layer.base_layer.in_features :] for layer, matrix in joined]
            torch._foreach_copy_(places, scaled)


def is_wide(base: nn.Module) -> bool:
    """A plain linear layer, not quantized, with far more outputs than inputs."""
    if type(base) is not nn.Linear or getattr(base, "bias", None) is not None:
        return False
    return base.out_features >= WIDE * base.in_features


def uses_kernels(config: TrainConfig, device: torch.device) -> bool:
    """Return whether the Triton kernels and compiled layers are used on this device."""
    return config.kernels != "torch" and device.type == "cuda"


def runs_without_masks(architecture: Architecture, dtype: torch.dtype) -> bool:
    """Return whether the documents' bounds take the place of masks, on a GPU."""
    fits = hands_on_attention(architecture) and document_attention.fits(architecture.config)
    return fits and dtype != torch.float32


def hands_on_attention(architecture: Architecture) -> bool:
    """Return whether the layers give all that attention needs to one that is registered."""
    if architecture.config.model_type in CHANGE_MASKS:
        return False
    known: Any = AutoModelForCausalLM._model_mapping  # private; of transformers 5.14 to 5.23
    return bool(known[type(architecture.config)]._supports_attention_backend)


def runs_compiled(
    layers: Iterable[nn.Module], config: TrainConfig, architecture: Architecture
) -> bool:
    """Return whether layers run compiled on a GPU.

    Experts that are looped over, and those that PEFT adapts, would be compiled again and again.
    """
    looped = any(is_looped(part) for layer in layers for part in layer.modules())
    return config.compile and architecture.family.compiles and not looped


def is_looped(part: Any) -> bool:
    """Return whether a module is experts that are gone through one by one, or adapted by PEFT."""
    experts = hasattr(part, "gate_up_proj") and getattr(part, "num_experts", 0) > 1
    return isinstance(part, ParamWrapper) or (experts and not isinstance(part, GroupedExperts))


def accelerate(spec: StageSpec, config: TrainConfig, device: torch.device) -> Acceleration:
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
        attend_by_bounds(spec.tree)
        for layer in layers if ours_inside and family.llama_attention else ():
            swap_attention(layer, family.attention_module)
    return Acceleration(
        norm=faster,
        layer_functions=compiled_functions(spec.layer_functions) if compiles else None,
        before_step=partial(LoraLinear.refresh, adapters),
        by_bounds=by_bounds,
        triton_loss=True,
    )


def compiled_functions(plain: LayerFunctions) -> LayerFunctions:
    """Return the same ways to run a layer, compiled."""
    return LayerFunctions(compiled(plain.plain), compiled(plain.checkpointed))


def attend_by_bounds(tree: nn.Module) -> None:
    """Let layers attend within the documents' bounds, without masks."""
    for part in tree.modules():  # transformers 5.14 to 5.23 look it up here at each call
        part_config: Any = getattr(part, "config", None)
        if part_config is not None:
            part_config._attn_implementation = document_attention.NAME


def swap_adapters(layer: nn.Module, *, may_join: bool) -> list[LoraLinear]:
    """Put a `LoraLinear` in the place of each plain LoRA layer, over the same parameters."""
    swapped = []
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PeftLinear and is_plain(child):
                swapped.append(LoraLinear(child, may_join=may_join))
                setattr(parent, name, swapped[-1])
    return swapped


def is_plain(layer: PeftLinear) -> bool:
    """One LoRA adapter, and no variant such as DoRA, which computes something else."""
    return (
        list(layer.lora_A) == [ADAPTER] and not layer.lora_variant and not layer.lora_bias[ADAPTER]
    )
