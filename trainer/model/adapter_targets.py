"""Where adapters sit, in PEFT's terms, and what full fine-tuning trains."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from headrace.schemas.adapter_config import LORA_KINDS, AdapterConfig
from headrace.schemas.errors import ConfigError
from headrace.schemas.layer_ranges import parse_layers
from headrace.trainer.model.adapters import ADAPTER
from headrace.trainer.model.architecture import find_router

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
    cannot tell their names from those of experts as they were stored once; and it leaves out
    routers that are linear layers and return more than a product, as Phi-MoE's.
    Beside `layers`, PEFT wants names.
    """
    mixture = any(True for _ in fused_experts(model))
    linear_layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if adapter.target_modules != "all-linear" or not (mixture or adapter.layers):
        return adapter.target_modules
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in linear_layers
        if module is not head and not is_router(model, module)
    }
    return sorted(linear - TAKEN_FOR_EXPERTS if mixture else linear)


def is_router(model: nn.Module, layer: nn.Module) -> bool:
    """Return whether a layer sends tokens to experts."""
    router = find_router(model)
    return router is not None and isinstance(layer, router.module_type)


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
            name = adapter.base_model_name_or_path
            wrapped: nn.Module = get_peft_model(model, adapter, adapter_name=ADAPTER)
            adapter.base_model_name_or_path = name  # PEFT puts the config's own in its place
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"adapter.target_modules = {adapter.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    for module in adapter.modules_to_save or ():
        if not any(f".{module}.modules_to_save." in f".{name}" for name in names_of(wrapped)):
            raise ConfigError(f'adapter.modules_to_save: no module is called "{module}"')
    return wrapped


def select_trained(
    model: nn.Module, adapter: AdapterConfig, layer_prefix: str, layers: int
) -> None:
    """Freeze what full fine-tuning is not to train. What transformers freezes, such as the biases
    by which Ernie's routers choose, stays so.

    Args:
        layer_prefix: path of the list of decoder layers.

    Raises:
        ConfigError: nothing is left to train.
    """
    wanted, parts = adapter_layers(adapter, layers), adapter.target_modules
    prefixes = None if wanted is None else tuple(f"{layer_prefix}.{index}." for index in wanted)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            continue
        in_parts = parts == "all-linear" or any(part in name for part in parts)
        in_layers = prefixes is None or name.startswith(prefixes)
        named = parts != "all-linear" and not name.startswith(f"{layer_prefix}.")
        if in_parts and (in_layers or named):
            parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"adapter.target_modules = {parts}: no weight has such a part in its name"
        )


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
