"""A model laid out without memory: where its parts are, and how its layers are to be called."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.trainer.architecture.config_limits import read_model_config, transformers_reads
from headrace.trainer.architecture.families import FAMILIES, Family, check_family, refuse
from headrace.trainer.architecture.families_state import (
    OTHER_TYPES,
    STATE_LAYERS,
    STATE_TYPES,
    has_state,
)
from headrace.trainer.architecture.weight_index import has_weights, same_bytes, stored_tensors
from headrace.trainer.architecture.weight_names import CheckpointNames

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# a field of `Family` -> the keys of config.json that models name it by
SCALES = {
    "embedding_multiplier": ("embedding_multiplier",),
    "logit_multiplier": ("logit_scale", "lm_head_multiplier"),
    "logit_divisor": ("logits_scaling",),
    "logit_softcap": ("final_logit_softcapping", "logits_soft_cap"),
}
NORMALIZER = "normalizer"  # buffer that is the root of the hidden size, times which embeddings are
LENGTH_DEPENDENT_ROTARY = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Router:
    """Module that computes the logits by which tokens choose experts, as transformers names it."""

    module_type: type[nn.Module]
    output_index: int  # of the logits in the module's output


@dataclass(frozen=True)
class Architecture:
    """Description of a model with this config that tells how to run it piece by piece."""

    family: Family
    config: Any  # transformers' config of the language model
    attention: str  # transformers' name of the implementation
    windows: list[int | None]  # by layer: tokens that attention reaches back, itself included
    rotary_types: list[str | None]  # by layer: which rotary table, where there are several
    stateful: list[bool]  # by layer: whether it has a state beside, or in place of, attention
    router: Router | None

    @property
    def tied(self) -> bool:
        """Return whether the head uses the embedding's weights."""
        return bool(self.config.tie_word_embeddings)

    @property
    def rotary_by_document(self) -> bool:
        """Return whether rotary frequencies depend on the length of the text."""
        return self.steady_rotary_tokens is not None

    @property
    def steady_rotary_tokens(self) -> int | None:
        """Tokens of a text up to which they do not; None if they never do."""
        settings = getattr(self.config, "rope_parameters", None) or {}
        tables = [table for table in settings.values() if isinstance(table, dict)] or [settings]
        key = "max_position_embeddings"
        found = [
            int(table.get(f"original_{key}") or getattr(self.config, key))
            for table in tables
            if table.get("rope_type") in LENGTH_DEPENDENT_ROTARY
        ]
        return min(found, default=None)

    @property
    def uses_chance(self) -> bool:
        """Return whether the model itself has dropout or adds noise in training."""
        return any(
            isinstance(value, int | float) and value > 0
            for key, value in self.config.to_dict().items()
            if any(word in key for word in ("drop", "jitter"))
        )

    @property
    def embedding_scale(self) -> float | None:
        """Factor of the embedding's rows; None where they are taken as they are."""
        root = self.setting(self.family.embedding_root)
        if root is not None:
            return float(torch.tensor(root**0.5, dtype=torch.bfloat16))
        return self.setting(self.family.embedding_multiplier)

    def setting(self, key: str | None, default: float | None = None) -> float | None:
        """A number of the config that the family's record names."""
        value = getattr(self.config, key, None) if key else None
        return default if value is None else float(value)


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a model directory.

    Raises:
        ConfigError: the model cannot be run by pipeline stages, with the reason.
    """
    read_model_config(directory)
    with transformers_reads(directory / "config.json"):
        try:
            whole = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise refuse(
                str(directory), "?", f"transformers cannot read config.json ({reason})"
            ) from None
    check_family(str(directory), whole.to_dict())
    text = whole.get_text_config()
    if text is not whole and has_weights(directory):
        # whose setting counts differs by model; the files tell
        text.tie_word_embeddings = not any(
            name.endswith("lm_head.weight") for name in stored_tensors(directory)
        )
    architecture = architecture_of(text, str(directory))
    if text is whole and architecture.tied and has_weights(directory):
        text.tie_word_embeddings = not has_own_head(directory, architecture)
    return architecture


def has_own_head(directory: Path, architecture: Architecture) -> bool:
    """Return whether the files hold a head other than the embedding that config.json ties it to.

    transformers 5 then unties them.
    """
    stored = stored_tensors(directory)
    if not any(f".{name}".endswith(f".{architecture.family.head}.weight") for name in stored):
        return False
    names = CheckpointNames(lay_out(architecture), stored)
    family = architecture.family
    parts = [f"{path}.weight" for path in (family.head, family.embedding)]
    if not all(part in names for part in parts):
        return False
    head, embedding = (stored[names.stored(part)[0]] for part in parts)
    return not same_bytes(head, embedding)


def architecture_of(config: Any, path: str) -> Architecture:
    """The architecture that belongs to a config of transformers; `path` is for messages.

    Raises:
        ConfigError: as above.
    """
    try:
        with transformers_reads(path):
            model, attention = lay_out_first(config, path)
        family = FAMILIES.get(config.model_type) or discover(model, path)
        return Architecture(
            family=family,
            config=config,
            attention=attention,
            windows=attention_windows(config, family, path),
            rotary_types=rotary_types(config, model, family),
            stateful=stateful_layers(config, family),
            router=find_router(model),
        )
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = f"it cannot be laid out ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise refuse(path, config.model_type, reason) from None


def lay_out(architecture: Architecture) -> nn.Module:
    """The whole model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            architecture.config, attn_implementation=architecture.attention
        )
    return model


def lay_out_first(config: Any, path: str) -> tuple[nn.Module, str]:
    """The model on the meta device, and the fastest attention that it can be laid out with."""
    reason = ""
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    config, attn_implementation=attention
                ), attention
        except (
            TypeError,
            ValueError,
        ) as error:  # this attention, or this architecture, is not to be had
            reason = str(error).splitlines()[0]
    raise refuse(path, config.model_type, reason)


def attention_windows(config: Any, family: Family, path: str) -> list[int | None]:
    """Each layer's attention window; None reaches back to the start."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    known = ATTENTION_TYPES | (STATE_TYPES | OTHER_TYPES if family.states else set())
    unknown = set(types) - known
    if unknown:
        raise refuse(path, config.model_type, f"layers of type {', '.join(sorted(unknown))}")
    return [window if kind == "sliding_attention" else None for kind in types]


def stateful_layers(config: Any, family: Family) -> list[bool]:
    """Return of each layer whether it has a state."""
    if family.states is None:
        return [False] * config.num_hidden_layers
    return [has_state(kind) for kind in config.layer_types]


def rotary_types(config: Any, model: nn.Module, family: Family) -> list[str | None]:
    """Return each layer's rotary table, where there are several."""
    layers = config.num_hidden_layers
    if family.rotary is None:
        return [None] * layers
    accepted = inspect.signature(model.get_submodule(family.rotary).forward).parameters
    return list(config.layer_types) if "layer_type" in accepted else [None] * layers


def find_router(model: Any) -> Router | None:
    """The router modules, if the model has experts."""
    for part in (model, getattr(model, model.base_model_prefix, None)):
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None and hasattr(recorder, "target_class"):
            return Router(recorder.target_class, recorder.index)
    return None


def discover(model: Any, path: str) -> Family:
    """A record for a model that has none: only if each of its parts has a place in the pipeline.

    Raises:
        ConfigError: naming the part without one.
    """
    model_type, layers = model.config.model_type, model.config.num_hidden_layers
    base = getattr(model, model.base_model_prefix, None)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if base is None or base is model or head is None:
        raise refuse(path, model_type, "it has no separate body and head")
    found: dict[str, str] = {}
    for name, part in [*base.named_children(), *model.named_children()]:
        full = f"{model.base_model_prefix}.{name}"
        if part is base:
            continue
        if isinstance(part, nn.Dropout) and part.p:
            reason = f"the pipeline has no place for its part {full}, a dropout of {part.p}"
            raise refuse(path, model_type, reason)
        if part is head:
            found["head"] = name
        elif part is embedding:
            found["embedding"] = full
        elif isinstance(part, nn.ModuleList) and len(part) == layers:
            found["layers"] = full
        elif "rotary" in type(part).__name__.lower():
            found["rotary"] = full
        elif "norm" in type(part).__name__.lower() and "norm" not in found:
            found["norm"] = full
        elif any(True for _ in part.parameters()) or not isinstance(part, nn.Dropout | nn.Identity):
            raise refuse(path, model_type, f"the pipeline has no place for its part {full}")
    missing = {"embedding", "layers", "head"} - found.keys()
    if missing:
        raise refuse(path, model_type, f"no {' or '.join(sorted(missing))} was found in it")
    return Family(
        embedding=found["embedding"],
        layers=found["layers"],
        norm=found.get("norm"),
        rotary=found.get("rotary"),
        head=found["head"],
        states=STATE_LAYERS.get(model_type),
        embedding_root="hidden_size" if hasattr(base, NORMALIZER) else None,
        **published_scales(model.config),
    )


def published_scales(config: Any) -> dict[str, Any]:
    """The config keys that scale or cap what flows between the parts of a model, by what they do.

    Whether this model goes by them, its trial shows.
    """
    return {
        what: key for what, keys in SCALES.items() for key in keys if getattr(config, key, None)
    }
