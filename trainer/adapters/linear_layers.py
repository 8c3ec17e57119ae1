"""The linear layers of a model, and what PEFT takes their names for.

Read against PEFT 0.21, which turns targets of releases before transformers 5 into fused experts.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from headrace.trainer.architecture.families_state import is_bypassed
from headrace.trainer.architecture.router import find_router

LINEAR = (nn.Linear, Conv1D)
EXPERT_PARAMETERS = re.compile(r"(?:^|\.)(\w+\.experts\.\w+)$")


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield all linear layers, the head, routers, and those that take no adapter left out."""
    left_out = {id(module) for _, module in routing_linears(model)}
    left_out.add(id(model.get_output_embeddings()))
    for name, module in model.named_modules():
        if not isinstance(module, LINEAR) or id(module) in left_out:
            continue
        if not takes_no_adapter(name, model):
            yield name, module


def takes_no_adapter(name: str, model: Any) -> bool:
    """Return whether an adapter on a layer is refused by PEFT, such as on a Mamba's `out_proj`, or
    would be without effect.
    """
    if is_bypassed(name, model.config.model_type):
        return True
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rsplit(".", 1)[-1])
    except ValueError:
        return True
    return False


def has_unadaptable(model: Any) -> bool:
    """Return whether a model has linear layers that take no adapter."""
    return any(
        isinstance(module, LINEAR) and takes_no_adapter(name, model)
        for name, module in model.named_modules()
    )


def linear_names(model: Any) -> set[str]:
    """Return the last names of what `linear_layers` yields."""
    return {name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)}


def routing_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield routers that are linear layers and return more than a product, as Phi-MoE's."""
    router = find_router(model)
    if router is None or router.module_type.forward is nn.Linear.forward:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, router.module_type):
            yield name, module


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that hold all experts of a layer, by their names from `mlp` on."""
    for name, parameter in model.named_parameters():
        match = EXPERT_PARAMETERS.search(name)
        if parameter.ndim == 3 and match:
            yield match[1], parameter


def taken_for_experts(names: Collection[str], model: nn.Module) -> set[str]:
    """Return those names that PEFT takes for fused experts, as which they were stored once.

    It then adapts the experts and no linear layer of that name, shared experts included.
    """
    taken = set()
    for name in names:
        probe = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # a part of a fused weight, which PEFT takes only with the others
            taken.add(name)
            continue
        if not probe.target_modules or name not in probe.target_modules:
            taken.add(name)
    return taken


def named_by_weight(wanted: LoraConfig, model: nn.Module) -> list[str]:
    """Return the linear layers that only the names of their weights mean to PEFT.

    Args:
        wanted: with targets that are what PEFT would take them for if it read no more than names.
    """
    taken = taken_for_experts(linear_names(model), model)
    return [
        name
        for name, _ in linear_layers(model)
        if name.rsplit(".", 1)[-1] in taken and check_target_module_exists(wanted, name)
    ]
