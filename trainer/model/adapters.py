"""Adapters in PEFT's terms: where they sit, what they start from, and their names in its files."""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.layer_ranges import parse_layers
from headrace.trainer.model.control_adapter import is_control

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the only adapter
LORA_KINDS = ("lora", "dora")
SVD_ITERATIONS = 16
WRAPPING = re.compile(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER})(?=\.)")
# names of linear layers that PEFT takes for the experts of a mixture, and adapts there instead
TAKEN_FOR_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
EXPERT_PARAMETERS = re.compile(r"(?:^|\.)(\w+\.experts\.\w+)$")


def lora_config(
    adapter: AdapterConfig, model: nn.Module, name: str, layers: int
) -> LoraConfig | None:
    """The adapter in PEFT's terms; None when weights themselves are trained.

    Args:
        model: without adapters, on the meta device.
        name: of the base model, for adapter_config.json.
        layers: how many the model has.

    Raises:
        ConfigError: layers or experts that the model does not have.
    """
    if adapter.kind not in LORA_KINDS:
        return None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=target_modules(adapter, model),
        target_parameters=expert_parameters(adapter, model),
        layers_to_transform=adapter_layers(adapter, layers),
        modules_to_save=adapter.modules_to_save or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.kind == "dora",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )


def target_modules(adapter: AdapterConfig, model: Any) -> str | list[str]:
    """What gets adapters. In a mixture "all-linear" leaves the MLPs out, fused experts or not: PEFT
    cannot tell their names from those of experts as they were stored once. Beside `layers`, PEFT
    wants names.
    """
    mixture = any(True for _ in fused_experts(model))
    if adapter.target_modules != "all-linear" or not (mixture or adapter.layers):
        return adapter.target_modules
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(linear - TAKEN_FOR_EXPERTS if mixture else linear)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that hold all experts of a layer, by their names from `mlp` on."""
    for name, parameter in model.named_parameters():
        match = EXPERT_PARAMETERS.search(name)
        if parameter.ndim == 3 and match:
            yield match[1], parameter


def adapter_layers(adapter: AdapterConfig, layers: int) -> list[int] | None:
    """The decoder layers that are trained; None is all.

    Raises:
        ConfigError: there are not so many.
    """
    if adapter.layers is None:
        return None
    wanted = parse_layers(adapter.layers)
    if wanted[-1] >= layers:
        raise ConfigError(
            f'adapter.layers = "{adapter.layers}": the model has layers 0 to {layers - 1}'
        )
    return wanted


def expert_parameters(adapter: AdapterConfig, model: nn.Module) -> list[str] | None:
    """The fused expert weights that get adapters, as PEFT names them.

    Raises:
        ConfigError: the model has none, or none of that name.
    """
    if adapter.target_parameters != "experts":
        for wanted in adapter.target_parameters:
            if not any(f".{name}".endswith(f".{wanted}") for name in names_of(model)):
                raise ConfigError(f'adapter.target_parameters: no weight is called "{wanted}"')
        return adapter.target_parameters or None
    found = {name for name, _ in fused_experts(model)}
    if not found:
        raise ConfigError('adapter.target_parameters = "experts": the model has no fused experts')
    return sorted(found)


def add_adapter(model: nn.Module, adapter: LoraConfig) -> nn.Module:
    """Wrap the model in PEFT's adapters, as PEFT itself would.

    Raises:
        ConfigError: targets that match nothing, or that cannot be adapted.
    """
    try:
        with warnings.catch_warnings():
            # of tied weights with adapters on one side: `headrace merge` unties them
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*tied.*")
            warnings.filterwarnings("ignore", message=".*rank_pattern.*", category=RuntimeWarning)
            wrapped: nn.Module = get_peft_model(model, adapter, adapter_name=ADAPTER)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"adapter.target_modules = {adapter.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    for module in adapter.modules_to_save or ():
        if not any(f".{module}.modules_to_save." in f".{name}" for name in names_of(wrapped)):
            raise ConfigError(f'adapter.modules_to_save: no module is called "{module}"')
    return wrapped


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def base_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return WRAPPING.sub("", name.removeprefix(PEFT_PREFIX))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, and is in no checkpoint of the base model."""
    return ".lora_" in name or is_control(name)


def file_name(name: str) -> str:
    """A trained parameter's name in `adapter_model.safetensors`."""
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def takes_over(adapter: AdapterConfig) -> bool:
    """Whether adapters start from a part of the frozen weights, which is taken out of these."""
    return adapter.kind in LORA_KINDS and adapter.init in ("pissa", "olora")


def exported_tensors(
    values: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Trained parameters under PEFT's names.

    Args:
        values: by name in the whole model.
        initial: what adapters that took over frozen weights started from. They are written for the
            base model as it is stored: twice as wide, with their start taken off.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if initial and (".lora_A." in name or ".lora_embedding_A." in name):
            value = torch.cat([value, initial.get(name, torch.zeros_like(value))], dim=0)
        elif initial and (".lora_B." in name or ".lora_embedding_B." in name):
            value = torch.cat([value, -initial.get(name, torch.zeros_like(value))], dim=1)
        tensors[file_name(name)] = value.contiguous()
    return tensors


def side_by_side(values: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters as one of a larger rank: those that were added to the weights, and those there now.

    Args:
        values: by name in the whole model; A is [r, inputs], B [outputs, r].
        merged: [times, ...] of the same.
    """
    return {
        name: torch.cat([*merged[name], value], dim=0 if "_A." in name else 1)
        if name in merged
        else value
        for name, value in values.items()
    }


def as_plain_lora(config: LoraConfig, times: int) -> LoraConfig:
    """The config for adapters that were made several times as wide, at the same scale."""
    factor = math.sqrt(times) if config.use_rslora else times
    wider = copy.deepcopy(config)
    wider.r, wider.lora_alpha = times * config.r, factor * config.lora_alpha
    return wider


def lora_layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, LoraLayer]]:
    """All adapted modules below named ones, with their names in the whole model."""
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, LoraLayer):
                yield ".".join(filter(None, (prefix, name))), part


@torch.no_grad()
def initial_values(name: str, layer: LoraLayer, init: str, seed: int) -> dict[str, Tensor]:
    """What an adapter starts from, by name below its layer: the same in every layout.

    With "pissa" and "olora" the adapter takes over a part of the frozen weight, which is taken out
    of it here, so the sum stays what it was.

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
    weight = base.data.float()
    if init == "pissa":
        torch.manual_seed(derive_seed(seed, "adapter", name))
        left, values, right = torch.svd_lowrank(weight, rank, niter=SVD_ITERATIONS)
        root = (values / scale).sqrt()
        down, up = root.unsqueeze(1) * right.T, left * root
    else:
        left, triangle = torch.linalg.qr(weight)
        down, up = triangle[:rank].clone(), left[:, :rank].clone()
    base.data = (weight - scale * (up @ down)).to(base.dtype)
    return {
        f"lora_A.{ADAPTER}.weight": down.contiguous(),
        f"lora_B.{ADAPTER}.weight": up.contiguous(),
    }


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


def select_trained(
    model: nn.Module, adapter: AdapterConfig, layer_prefix: str, layers: int
) -> None:
    """Freeze what full fine-tuning is not to train.

    Args:
        layer_prefix: path of the list of decoder layers.

    Raises:
        ConfigError: nothing is left to train.
    """
    wanted, parts = adapter_layers(adapter, layers), adapter.target_modules
    prefixes = None if wanted is None else tuple(f"{layer_prefix}.{index}." for index in wanted)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        in_parts = parts == "all-linear" or any(part in name for part in parts)
        in_layers = prefixes is None or name.startswith(prefixes)
        named = parts != "all-linear" and not name.startswith(f"{layer_prefix}.")
        if in_parts and (in_layers or named):
            parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"adapter.target_modules = {parts}: no weight has such a part in its name"
        )
