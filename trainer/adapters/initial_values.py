"""Initial values of adapters, the same in every layout."""

import math

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import Tensor

from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.adapters.names import ADAPTER

SVD_ITERATIONS = 16
DOWN, UP = (f"lora_{part}.{ADAPTER}.weight" for part in "AB")


@torch.no_grad()
def initial_values(name: str, layer: LoraLayer, init: str, seed: int) -> dict[str, Tensor]:
    """Return an adapter's initial values, by name below its layer: the same in every layout.

    With "pissa" and "olora" the adapter takes over a part of the frozen weight, which is taken out
    of it here, so the sum stays what it was. With "loftq" this is for weights that are not
    quantized, of which nothing is lost.

    Sources: LoRA https://arxiv.org/abs/2106.09685, DoRA https://arxiv.org/abs/2402.09353, PiSSA
    https://arxiv.org/abs/2404.02948, OLoRA https://arxiv.org/abs/2406.01775.
    """
    values: dict[str, Tensor] = {}
    if ADAPTER in layer.lora_embedding_A:
        down, up = "lora_embedding_A", "lora_embedding_B"
        values[f"{down}.{ADAPTER}"] = torch.zeros(layer.lora_embedding_A[ADAPTER].shape)
        shape = layer.lora_embedding_B[ADAPTER].shape
        values[f"{up}.{ADAPTER}"] = torch.empty(shape).normal_(generator=_generator(name, up, seed))
    elif init in ("pissa", "olora"):
        values = _taken_from_base(name, layer, init, seed)
    else:
        shape = layer.lora_A[ADAPTER].weight.shape
        generator = _generator(name, "lora_A", seed)
        down_values = torch.empty(shape)
        if init == "gaussian":
            down_values.normal_(std=1 / layer.r[ADAPTER], generator=generator)
        else:  # as PEFT: Kaiming's uniform distribution
            bound = 1 / math.sqrt(shape[-1])
            down_values.uniform_(-bound, bound, generator=generator)
        values[f"lora_A.{ADAPTER}.weight"] = down_values
        values[f"lora_B.{ADAPTER}.weight"] = torch.zeros(layer.lora_B[ADAPTER].weight.shape)
    if ADAPTER in layer.lora_magnitude_vector:
        values[f"lora_magnitude_vector.{ADAPTER}.weight"] = _magnitudes(layer, values)
    return values


def _generator(name: str, part: str, seed: int) -> torch.Generator:
    parameter = f"{name}.{part}.{ADAPTER}.weight"
    return torch.Generator().manual_seed(derive_seed(seed, "adapter", parameter))


def _taken_from_base(name: str, layer: LoraLayer, init: str, seed: int) -> dict[str, Tensor]:
    """The principal part of the frozen weight, by singular values or by QR; taken out of it."""
    base, rank, scale = layer.get_base_layer().weight, layer.r[ADAPTER], layer.scaling[ADAPTER]
    weight = transpose(base.data.float(), layer.fan_in_fan_out)  # GPT-2's are [in, out]
    if init == "pissa":
        parts = principal_part(name, layer, weight, seed)
        down, up = parts[DOWN], parts[UP]
    else:
        left, triangle = torch.linalg.qr(weight)
        down, up = triangle[:rank].clone(), left[:, :rank].clone()
    rest = transpose(weight - scale * (up @ down), layer.fan_in_fan_out)
    base.data = rest.to(base.dtype).contiguous()
    return {DOWN: down.contiguous(), UP: up.contiguous()}


@torch.no_grad()
def principal_part(name: str, layer: LoraLayer, weight: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the adapter whose product is the principal part of a matrix, by singular values.

    Args:
        weight: [outputs, inputs] float32: PiSSA's the frozen weight, LoftQ's
            (https://arxiv.org/abs/2310.08659) what it loses when it is quantized.
    """
    torch.manual_seed(derive_seed(seed, "adapter", name))
    rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
    left, values, right = torch.svd_lowrank(weight, rank, niter=SVD_ITERATIONS)
    root = (values / scale).sqrt()
    return {DOWN: (root.unsqueeze(1) * right.T).contiguous(), UP: (left * root).contiguous()}


def _magnitudes(layer: LoraLayer, values: dict[str, Tensor]) -> Tensor:
    """DoRA's magnitudes: the norms of the weight as it starts."""
    base = layer.get_base_layer().weight.data.float()
    magnitude = layer.lora_magnitude_vector[ADAPTER]
    if ADAPTER in layer.lora_embedding_A:
        delta = torch.zeros_like(base)
        norm: Tensor = magnitude.get_weight_norm(base, delta.T, layer.scaling[ADAPTER])
        return norm
    down = values[f"lora_A.{ADAPTER}.weight"].to(base.device)
    up = values[f"lora_B.{ADAPTER}.weight"].to(base.device)
    norm = magnitude.get_weight_norm(base, up @ down, layer.scaling[ADAPTER])
    return norm
