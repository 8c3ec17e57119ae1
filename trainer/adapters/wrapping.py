"""A model wrapped in PEFT's adapters."""

import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.utils.other import get_pattern_key
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.names import ADAPTER, PEFT_PREFIX, base_name, names_of


def add_adapter(
    model: nn.Module, adapter: LoraConfig, by_weight: Mapping[str, str] = MappingProxyType({})
) -> nn.Module:
    """Wrap the model in PEFT's adapters, as PEFT itself would.

    Args:
        by_weight: linear layers that PEFT finds by the names of their weights alone, and the names
            to look their ranks and scales up by.

    Raises:
        ConfigError: targets that match nothing, or that cannot be adapted.
    """
    saved = list(adapter.modules_to_save or ())
    try:
        with warnings.catch_warnings():
            # of tied weights with adapters on one side: `headrace merge` unties them
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*tied.*")
            # of patterns and exclusions of weights: `check_patterns` and `check_expressions` look
            warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not.*")
            warnings.filterwarnings("ignore", message=".*no modules were excluded.*")
            if adapter.base_model_name_or_path:  # or PEFT puts what the model says in its place
                model.__dict__["name_or_path"] = adapter.base_model_name_or_path
            frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
            wrapped: nn.Module = get_peft_model(model, adapter, adapter_name=ADAPTER)
            adapt_by_weight(wrapped, by_weight, adapter)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"adapter.target_modules = {adapter.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    adapter.modules_to_save = saved or None  # PEFT adds what heads of scores are called elsewhere
    for module in saved:
        if not any(f".{module}.modules_to_save." in f".{name}" for name in names_of(wrapped)):
            raise ConfigError(f'adapter.modules_to_save: no module is called "{module}"')
    for name, parameter in wrapped.named_parameters():
        if base_name(name) in frozen:  # by transformers; PEFT trains all of a saved module
            parameter.requires_grad_(False)
    return wrapped


def adapt_by_weight(wrapped: nn.Module, by_weight: Mapping[str, str], adapter: LoraConfig) -> None:
    """Put adapters on linear layers that PEFT would take for experts, and name their weights to it.

    It computes the same by the whole change of the weight, which is never formed here.
    """
    for name, key in by_weight.items():
        rank = value_for(key, adapter.rank_pattern, adapter.r)
        alpha = value_for(key, adapter.alpha_pattern, adapter.lora_alpha)
        base = wrapped.get_submodule(PEFT_PREFIX + name)
        layer = Linear(base, ADAPTER, config=adapter, r=int(rank), lora_alpha=alpha)
        wrapped.set_submodule(PEFT_PREFIX + name, layer)
        weight = f"{name}.weight"  # by which PEFT looks patterns up
        own = rf"^{re.escape(weight)}"
        if value_for(weight, adapter.rank_pattern, adapter.r) != rank:
            adapter.rank_pattern = {own: int(rank), **adapter.rank_pattern}
        if value_for(weight, adapter.alpha_pattern, adapter.lora_alpha) != alpha:
            adapter.alpha_pattern = {own: alpha, **adapter.alpha_pattern}
    if by_weight:
        weights = [f"{name}.weight" for name in by_weight]
        adapter.target_parameters = sorted([*(adapter.target_parameters or ()), *weights])


def value_for(name: str, patterns: dict[str, Any], otherwise: float) -> float:
    """Return the rank or alpha of a module, by PEFT's rule."""
    value: float = patterns.get(get_pattern_key(list(patterns), name), otherwise)
    return value
