"""Targets of adapters, in PEFT's terms."""

import logging
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.layer_ranges import parse_layers
from headrace.trainer.adapters.linear_layers import (
    LINEAR,
    fused_experts,
    has_unadaptable,
    linear_layers,
    linear_names,
    named_by_weight,
    routing_linears,
    taken_for_experts,
)
from headrace.trainer.adapters.names import PEFT_PREFIX, is_named, names_of
from headrace.trainer.adapters.pattern_checks import (
    check_expressions,
    check_patterns,
    check_ranks,
    unmatched,
)
from headrace.trainer.families.score import is_scored
from headrace.trainer.vision.families import VisionFamily

logger = logging.getLogger(__name__)

SHOWN = 3  # modules that a message names


def lora_config(
    adapter: AdapterConfig,
    model: nn.Module,
    name: str,
    layers: int,
    *,
    dora: bool,
    vision: VisionFamily | None = None,
) -> LoraConfig:
    """Return the adapter in PEFT's terms.

    Args:
        model: without adapters, on the meta device.
        name: of the base model, for adapter_config.json.
        layers: how many the model has.
        dora: with magnitudes apart.
        vision: where the model is run with its vision tower.

    Raises:
        ConfigError: layers or experts that the model does not have.
    """
    check_expressions(adapter, model)
    targets = target_modules(adapter, model)
    if vision is not None:
        targets = vision_targets(adapter, model, vision, targets)
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=adapter.exclude_modules or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        target_parameters=expert_parameters(adapter, model),
        layers_to_transform=None if vision else adapter_layers(adapter, layers),
        modules_to_save=adapter.modules_to_save or None,
        use_rslora=adapter.rslora,
        use_dora=dora,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),  # as in GPT-2
        task_type="SEQ_CLS" if is_scored(model) else "CAUSAL_LM",
        base_model_name_or_path=name,
    )


def target_modules(adapter: AdapterConfig, model: Any) -> str | list[str]:
    """Return what gets adapters, as PEFT is told.

    "all-linear" becomes a list of names where PEFT's own would be wrong: in mixtures, whose names
    it may take for those of fused experts, with routers that are linear layers, with layers that
    take no adapter, and beside `layers` and `modules_to_save`, with which PEFT wants names. So does
    an expression where PEFT would go by the last names of what it matches.

    Raises:
        ConfigError: a target whose output is not that of a linear layer.
    """
    wanted, linear = adapter.target_modules, linear_names(model)
    taken = taken_for_experts(linear, model) if any(True for _ in fused_experts(model)) else set()
    if wanted != "all-linear":
        refuse_routers(adapter, model)
        return resolved(adapter, model, taken) if adapter.target_pattern and taken else wanted
    routers = any(True for _ in routing_linears(model))
    mixture = any(True for _ in fused_experts(model))
    if not (mixture or routers or adapter.layers or has_unadaptable(model)):
        return wanted
    return sorted(linear - taken)


def vision_targets(
    adapter: AdapterConfig, model: Any, vision: VisionFamily, targets: str | list[str]
) -> list[str]:
    """Return the modules of a vision-language model that get adapters, by their whole names, as
    tower and language model have parts of the same names.

    Raises:
        ConfigError: none of them is in the tower, though the config asks for it.
    """
    names = sorted(linear_names(model)) if targets == "all-linear" else targets
    everywhere = asked(adapter.model_copy(update={"layers": None}), names)
    limited = asked(adapter, names)
    saved = adapter.modules_to_save
    found = []
    for name, module in model.named_modules():
        wanted = everywhere if vision.is_vision(name) else limited
        linear = isinstance(module, nn.Linear | nn.Embedding)
        inside = any(f".{part}." in f".{name}." for part in saved)
        if linear and not inside and check_target_module_exists(wanted, name):
            found.append(name)
    seen = [name for name in found if vision.is_vision(name)]
    if adapter.vision and not seen:
        ends = sorted({n.split(".")[-1] for n, _ in linear_layers(model) if vision.is_vision(n)})
        raise ConfigError(
            f"adapter.vision = true: adapter.target_modules = {adapter.target_modules} names "
            f"nothing in the vision tower; add some of {', '.join(ends)}"
        )
    return [name for name in found if adapter.vision or name not in seen]


def resolved(adapter: AdapterConfig, model: nn.Module, taken: set[str]) -> list[str]:
    """Return the modules that an expression names, those left out that PEFT takes for experts.

    Raises:
        ConfigError: one that no adapter can be put on.
    """
    wanted = asked(adapter, adapter.target_modules)
    found = [(n, m) for n, m in model.named_modules() if check_target_module_exists(wanted, n)]
    for name, module in found:
        if not isinstance(module, (*LINEAR, nn.Embedding)):
            raise ConfigError(
                f'adapter.target_modules: "{adapter.target_pattern}" matches {name}, a '
                f"{type(module).__name__}, which has no weight that an adapter can be put on; "
                "narrow it (experts: adapter.target_parameters)"
            )
    return [name for name, _ in found if name.rsplit(".", 1)[-1] not in taken]


def asked(adapter: AdapterConfig, targets: str | list[str]) -> LoraConfig:
    """Return what the config asks of some targets, for PEFT's rule by names alone."""
    return LoraConfig(
        target_modules=targets,
        exclude_modules=adapter.exclude_modules or None,
        layers_to_transform=None if adapter.layers is None else parse_layers(adapter.layers),
        modules_to_save=adapter.modules_to_save or None,
    )


def targets_by_weight(adapter: AdapterConfig, model: nn.Module, *, dora: bool) -> dict[str, str]:
    """Return linear layers of which PEFT is told the weights, and the names to look patterns up by.

    Those that are asked for, but that PEFT takes for experts by their own names, and those in
    `target_parameters`. It puts no DoRA on weights.
    """
    if dora:
        return {}
    given = weights_of_linear_layers(adapter, model).values()
    found = {weight.removesuffix(".weight"): weight for weights in given for weight in weights}
    if isinstance(adapter.target_modules, list) or not any(True for _ in fused_experts(model)):
        return found
    targets: str | list[str] = adapter.target_modules
    if targets == "all-linear":
        targets = sorted(linear_names(model))
    return found | {name: name for name in named_by_weight(asked(adapter, targets), model)}


def weights_of_linear_layers(adapter: AdapterConfig, model: nn.Module) -> dict[str, list[str]]:
    """Return the weights that each entry of `target_parameters` names, if all are linear layers'.

    These get ordinary adapters, which compute the same.
    """
    if isinstance(adapter.target_parameters, str):
        return {}
    linear, names = {f"{name}.weight" for name, _ in linear_layers(model)}, names_of(model)
    found = {
        entry: [name for name in names if is_named(name, entry)]
        for entry in adapter.target_parameters
    }
    return {entry: weights for entry, weights in found.items() if weights and linear >= {*weights}}


def refuse_routers(adapter: AdapterConfig, model: nn.Module) -> None:
    """Refuse adapters on routers.

    Raises:
        ConfigError: naming the target.
    """
    for name, module in routing_linears(model):
        if check_target_module_exists(asked(adapter, adapter.target_modules), name):
            raise ConfigError(
                f'adapter.target_modules: "{name.rsplit(".", 1)[-1]}" is a '
                f"{type(module).__name__}, whose output no adapter can be added to; name it in "
                "adapter.modules_to_save to train it in full, or leave it out"
            )


def check_targets(adapter: AdapterConfig, plain: nn.Module, wrapped: nn.Module) -> None:
    """Refuse targets and patterns that match nothing, and say what is left without an adapter.

    Args:
        plain: the model without adapters.
        wrapped: the same with them.

    Raises:
        ConfigError: naming the targets.
    """
    layers = {
        name.removeprefix(PEFT_PREFIX)
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    wanted = adapter.target_modules
    if isinstance(wanted, str):
        taken = taken_for_experts(linear_names(plain), plain)
    else:
        taken = taken_for_experts(wanted, plain)
        matched = [t for t in wanted if t in taken or any(is_named(name, t) for name in layers)]
        missing = [target for target in wanted if target not in matched]
        if missing and adapter.path is None:  # else the file's tensors say what there must be
            raise unmatched("adapter.target_modules", missing, linear_names(plain))
    if adapter.path is None:
        check_patterns(adapter, wrapped)
        check_ranks(adapter, wrapped)
    if any(True for _ in fused_experts(plain)):
        tell_left_out(adapter, plain, layers, taken)


def tell_left_out(
    adapter: AdapterConfig, plain: nn.Module, layers: set[str], taken: set[str]
) -> None:
    """Say which linear layers that are asked for have no adapter."""
    left = set(named_by_weight(asked(adapter, sorted(taken)), plain)) if taken else set()
    if adapter.target_pattern is not None:
        left &= set(named_by_weight(asked(adapter, adapter.target_pattern), plain))
    if left := left - layers:
        shown = ", ".join(sorted(left)[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
        logger.info(
            "%d linear layers have no adapter, because PEFT takes %s for the fused experts: %s",
            len(left),
            ", ".join(sorted(taken)),
            shown,
        )


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
        linear = weights_of_linear_layers(adapter, model)
        kept = [wanted for wanted in adapter.target_parameters if wanted not in linear]
        for wanted in kept:
            if not any(is_named(name, wanted) for name in names_of(model)):
                raise ConfigError(f'adapter.target_parameters: no weight is called "{wanted}"')
        return kept or None
    found = {name for name, _ in fused_experts(model)}
    if not found:
        raise ConfigError('adapter.target_parameters = "experts": the model has no fused experts')
    return sorted(found)
