"""Puts faster parts into a stage: `kernels = "auto"` on a GPU. What it computes stays the same.

Each part has a plain twin that runs with `kernels = "torch"` and on CPU: transformers' and PEFT's
own modules, torch's attention under a mask, and the loss in torch.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional

from headrace.kernels.lora_linear import lora_linear
from headrace.schemas.train_config import TrainConfig
from headrace.trainer import document_attention
from headrace.trainer.layer_functions import LayerFunctions, compiled, run_layer, run_layer_again
from headrace.trainer.stage import Stage

ADAPTER = "default"  # the only one that a run trains


class LoraLinear(nn.Module):
    """A PEFT LoRA layer's parts under the same names, computed in the type of the input."""

    def __init__(self, layer: PeftLinear) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_A = layer.lora_A
        self.lora_B = layer.lora_B
        self.dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
        self.scale = layer.scaling[ADAPTER]

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            functional.dropout(x, self.dropout, self.training),
            self.base_layer(x),
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            self.scale,
        )


def uses_kernels(config: TrainConfig, device: torch.device) -> bool:
    """Whether the faster parts run here."""
    return config.kernels == "auto" and device.type == "cuda"


def attention_name(config: TrainConfig, model_config: Any, device: torch.device) -> str:
    """Which of transformers' attentions the layers are to call."""
    fits = document_attention.fits(model_config)
    return document_attention.NAME if uses_kernels(config, device) and fits else "sdpa"


def accelerate(stage: Stage, config: TrainConfig, model_config: Any, device: torch.device) -> None:
    """Swap the faster parts in, in place."""
    if not uses_kernels(config, device):
        return
    for layer in stage.layers:
        swap_adapters(layer)
    if config.compile:
        stage.layer_functions = LayerFunctions(compiled(run_layer), compiled(run_layer_again))
    half = stage.compute_dtype != torch.float32
    stage.by_bounds = half and document_attention.fits(model_config)
    stage.triton = True


def swap_adapters(layer: nn.Module) -> None:
    """Put a `LoraLinear` in the place of each plain LoRA layer, over the same parameters."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PeftLinear and is_plain(child):
                setattr(parent, name, LoraLinear(child))


def is_plain(layer: PeftLinear) -> bool:
    """One LoRA adapter, and no variant such as DoRA, which computes something else."""
    return (
        list(layer.lora_A) == [ADAPTER] and not layer.lora_variant and not layer.lora_bias[ADAPTER]
    )
