"""Patterns of a config, each of which must match something in the model."""

import difflib
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.names import ADAPTER, PEFT_PREFIX, is_named, lora_layers
from headrace.trainer.adapters.patterns import SECONDS, Matcher

CONFIG = Path("adapter")  # where the patterns are, for messages


def adapted_modules(wrapped: nn.Module) -> list[str]:
    """Return the names of what has adapters: modules, and parameters that have one of their own."""
    names = []
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix(PEFT_PREFIX).replace(".base_layer", "")
            own = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            names.append(path + own)
    return names


def check_expressions(adapter: AdapterConfig, plain: nn.Module) -> None:
    """Check the config's expressions over modules, within a limit of time, before PEFT runs them.

    Raises:
        ConfigError: one is none, takes too long, or matches nothing.
    """
    names = [name for name, _ in plain.named_modules()]
    matcher = Matcher(CONFIG, time.monotonic() + SECONDS)
    excluded = adapter.exclude_modules
    expressions = {"target_modules": adapter.target_pattern}
    expressions["exclude_modules"] = excluded if isinstance(excluded, str) else None
    for key, pattern in expressions.items():
        if pattern is not None and not matcher.matching(key, pattern, names):
            raise no_match(key, pattern, last_names(names))
    listed = excluded if isinstance(excluded, list) else []
    missing = [entry for entry in listed if not any(is_named(name, entry) for name in names)]
    if missing:
        raise unmatched("adapter.exclude_modules", missing, last_names(names))


def check_patterns(adapter: AdapterConfig, wrapped: nn.Module) -> None:
    """Check that every pattern of ranks and scales matches a module that has an adapter.

    Raises:
        ConfigError: naming the one that matches nothing.
    """
    adapted = adapted_modules(wrapped)
    matcher = Matcher(CONFIG, time.monotonic() + SECONDS)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            if not matcher.matching(key, rf"(.*\.)?({pattern})", adapted):
                raise no_match(key, pattern, last_names(adapted))


def check_ranks(adapter: AdapterConfig, wrapped: nn.Module) -> None:
    """Refuse ranks that are above what a weight can have: nothing is gained by more.

    A smaller weight beside a larger one, as a gate of shared experts, is no fault, but where
    adapters take over a part of each weight by singular values (OLoRA takes what rows there are).

    Raises:
        ConfigError: naming the largest rank that adds anything.
    """
    by_rank: dict[int, list[tuple[int, str]]] = {}
    of_each = adapter.takes_over and adapter.init != "olora"
    for name, layer in lora_layers({"": wrapped}):
        rank = layer.r[ADAPTER]
        limit = min(layer.in_features, layer.out_features)
        by_rank.setdefault(rank, []).append((limit, name.removeprefix(PEFT_PREFIX)))
    for rank, weights in by_rank.items():
        limit, name = min(weights) if of_each else max(weights)
        if rank > limit:
            key = "rank" if rank == adapter.rank else "rank_pattern"
            which = "a weight it takes a part of" if of_each else "its largest weight"
            raise ConfigError(
                f"adapter.{key}: rank {rank} is above the smaller dimension of {which}, "
                f"{limit} of {name}; use at most {limit}"
            )


def no_match(key: str, pattern: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an expression that matches nothing."""
    return ConfigError(
        f'adapter.{key}: "{pattern}" matches no module; an expression must match '
        f"{'the end of' if key.endswith('_pattern') else 'all of'} its name "
        f"(there are {', '.join(sorted(known))})"
    )


def last_names(names: Iterable[str]) -> set[str]:
    """Return the last parts of names, numbers left out."""
    parts = {name.rsplit(".", 1)[-1] for name in names}
    return {part for part in parts if part and not part.isdecimal()}


def unmatched(key: str, missing: Sequence[str], known: Collection[str]) -> ConfigError:
    """Return the error for names in a list of targets that match nothing in the model."""
    named = ", ".join(f'"{name}"' for name in missing)
    nearest = difflib.get_close_matches(missing[0], sorted(known), n=1)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    return ConfigError(
        f"{key}: {named} matches nothing that is trained in this model; {hint}"
        f"correct it or leave it out (there are {', '.join(sorted(known))})"
    )
