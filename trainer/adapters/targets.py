"""Targets of adapters, in PEFT's terms."""

import difflib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.layer_ranges import parse_layers
from headrace.trainer.adapters.names import ADAPTER, PEFT_PREFIX, base_name
from headrace.trainer.architecture.architecture import find_router

logger = logging.getLogger(__name__)

SHOWN = 3  # modules that a message names
EXPERT_PARAMETERS = re.compile(r"(?:^|\.)(\w+\.experts\.\w+)$")


def lora_config(
    adapter: AdapterConfig, model: nn.Module, name: str, layers: int, *, dora: bool
) -> LoraConfig:
    """Return the adapter in PEFT's terms.

    Args:
        model: without adapters, on the meta device.
        name: of the base model, for adapter_config.json.
        layers: how many the model has.
        dora: with magnitudes apart.

    Raises:
        ConfigError: layers or experts that the model does not have.
    """
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=target_modules(adapter, model),
        target_parameters=expert_parameters(adapter, model),
        layers_to_transform=adapter_layers(adapter, layers),
        modules_to_save=adapter.modules_to_save or None,
        use_rslora=adapter.rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )


def target_modules(adapter: AdapterConfig, model: Any) -> str | list[str]:
    """Return what gets adapters, as PEFT is told.

    "all-linear" becomes a list of names where PEFT's own would be wrong: in mixtures, whose names
    it may take for those of fused experts, with routers that are linear layers, and beside
    `layers`, with which PEFT wants names.

    Raises:
        ConfigError: a target whose output is not that of a linear layer.
    """
    if adapter.target_modules != "all-linear":
        refuse_routers(adapter.target_modules, model)
        return adapter.target_modules
    routers = any(True for _ in routing_linears(model))
    mixture = any(True for _ in fused_experts(model))
    refused = any(peft_refuses(name, model) for name in linear_names(model, adaptable=False))
    if not (mixture or routers or adapter.layers or refused):
        return adapter.target_modules
    linear = linear_names(model)
    return sorted(linear - taken_for_experts(linear, model))


def peft_refuses(name: str, model: nn.Module) -> bool:
    """Return whether PEFT puts no adapter on layers of a name, such as a Mamba's `out_proj`, whose
    weight is used elsewhere than in the layer. Read against PEFT 0.18 to 0.20.
    """
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


def linear_names(model: Any, *, adaptable: bool = True) -> set[str]:
    """Return the last names of all linear layers, the head and routers left out.

    Args:
        adaptable: leave out those as well that PEFT refuses.
    """
    left_out = {id(module) for _, module in routing_linears(model)}
    left_out.add(id(model.get_output_embeddings()))
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in left_out
    }
    return {name for name in names if not (adaptable and peft_refuses(name, model))}


def routing_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield routers that are linear layers and return more than a product, as Phi-MoE's."""
    router = find_router(model)
    if router is None or router.module_type.forward is nn.Linear.forward:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, router.module_type):
            yield name, module


def refuse_routers(targets: Sequence[str], model: nn.Module) -> None:
    """Refuse adapters on routers.

    Raises:
        ConfigError: naming the target.
    """
    for name, module in routing_linears(model):
        for target in targets:
            if is_named(name, target):
                raise ConfigError(
                    f'adapter.target_modules: "{target}" is a {type(module).__name__}, whose '
                    "output no adapter can be added to; name it in adapter.modules_to_save to "
                    "train it in full, or leave it out"
                )


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


def is_named(path: str, target: str) -> bool:
    """Return whether a target means the module at a path, by PEFT's rule."""
    return path == target or path.endswith(f".{target}")


def check_targets(adapter: AdapterConfig, plain: nn.Module, wrapped: nn.Module) -> None:
    """Refuse targets that match nothing, and say what is left without an adapter.

    Args:
        plain: the model without adapters.
        wrapped: the same with them.

    Raises:
        ConfigError: naming the targets.
    """
    adapted = [
        name.removeprefix(PEFT_PREFIX)
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    ]
    if adapter.target_modules == "all-linear":
        mixture = any(True for _ in fused_experts(plain))
        taken = taken_for_experts(linear_names(plain), plain) if mixture else set()
    else:
        taken = taken_for_experts(adapter.target_modules, plain)
        missing = [
            target
            for target in adapter.target_modules
            if target not in taken and not any(is_named(name, target) for name in adapted)
        ]
        if missing:
            raise unmatched("adapter.target_modules", missing, linear_names(plain))
    left = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and any(is_named(name, target) for target in taken)
    ]
    if left:
        shown = ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
        logger.info(
            "%d linear layers have no adapter, because PEFT takes %s for the fused experts: %s",
            len(left),
            ", ".join(sorted(taken)),
            shown,
        )


def unmatched(key: str, missing: Sequence[str], known: Collection[str]) -> ConfigError:
    """Return the error for names in a list of targets that match nothing in the model."""
    named = ", ".join(f'"{name}"' for name in missing)
    nearest = difflib.get_close_matches(missing[0], sorted(known), n=1)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    return ConfigError(
        f"{key}: {named} matches nothing that is trained in this model; {hint}"
        f"correct it or leave it out (there are {', '.join(sorted(known))})"
    )


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
            if adapter.base_model_name_or_path:  # or PEFT puts what the model says in its place
                model.__dict__["name_or_path"] = adapter.base_model_name_or_path
            frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
            wrapped: nn.Module = get_peft_model(model, adapter, adapter_name=ADAPTER)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"adapter.target_modules = {adapter.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    for module in adapter.modules_to_save or ():
        if not any(f".{module}.modules_to_save." in f".{name}" for name in names_of(wrapped)):
            raise ConfigError(f'adapter.modules_to_save: no module is called "{module}"')
    for name, parameter in wrapped.named_parameters():
        if base_name(name) in frozen:  # by transformers; PEFT trains all of a saved module
            parameter.requires_grad_(False)
    return wrapped


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
