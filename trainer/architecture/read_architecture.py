"""Reads a model directory, and lays the model out without memory to see how it is to be run."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.config_limits import read_model_config, transformers_reads
from headrace.trainer.architecture.families import (
    FAMILIES,
    LANGUAGE_FAMILIES,
    Family,
    check_family,
    refuse,
)
from headrace.trainer.architecture.families_state import (
    OTHER_TYPES,
    STATE_LAYERS,
    STATE_TYPES,
    UNSUPPORTED,
    has_state,
)
from headrace.trainer.architecture.router import find_router
from headrace.trainer.architecture.weight_index import has_weights, same_bytes, stored_tensors
from headrace.trainer.architecture.weight_names import CheckpointNames
from headrace.trainer.families.alibi import alibi_of
from headrace.trainer.families.attention import known_types, layer_count, window_of
from headrace.trainer.families.ends import ends_of
from headrace.trainer.families.remote_code import MEANING, has_code
from headrace.trainer.families.streams import stream_of
from headrace.trainer.vision.families import vision_family

# a field of `Family` -> the keys of config.json that models name it by
SCALES = {
    "embedding_multiplier": ("embedding_multiplier",),
    "logit_multiplier": ("logit_scale", "lm_head_multiplier"),
    "logit_divisor": ("logits_scaling",),
    "logit_softcap": ("final_logit_softcapping", "logits_soft_cap"),
}
NORMALIZER = "normalizer"  # buffer that is the root of the hidden size, times which embeddings are


GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"
PACKED_HEADS = {"qweight", "weight_packed"}  # what a quantized head's weight is called
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def read_architecture(directory: Path, *, vision: bool = False) -> Architecture:
    """The architecture of a model directory.

    Args:
        vision: with its vision tower; else the text part of a multimodal model.

    Raises:
        ConfigError: the model cannot be run by pipeline stages, with the reason.
    """
    whole = read_whole_config(directory)
    text = whole.get_text_config()
    forget_quantization(whole, text)
    if vision:
        return with_own_head(vision_architecture(whole, str(directory)), directory)
    if text is not whole and has_weights(directory):
        # whose setting counts differs by model; the files tell
        text.tie_word_embeddings = not any(
            ".lm_head." in f".{name}" for name in stored_tensors(directory)
        )
    architecture = architecture_of(text, str(directory))
    if text is whole and has_weights(directory):
        text.tie_word_embeddings = is_tied(directory, architecture)
    return architecture


def with_own_head(architecture: Architecture, directory: Path) -> Architecture:
    """Return the architecture, untied where the files hold a head of their own."""
    if has_weights(directory) and architecture.tied and has_own_head(directory, architecture):
        architecture.config.tie_word_embeddings = False
        architecture.whole.tie_word_embeddings = False
    return architecture


def read_whole_config(directory: Path) -> Any:
    """Return transformers' config of a model directory.

    Raises:
        ConfigError: it cannot be read, or is of a family that is known not to work.
    """
    model_type = str(read_model_config(directory).get("model_type", ""))
    with transformers_reads(directory / "config.json"):
        try:
            whole = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, KeyError) as error:
            if has_code(directory):
                raise ConfigError(f"{directory}: {MEANING}") from None
            reason = str(error).splitlines()[0]
            raise refuse(
                str(directory), model_type, f"transformers cannot read config.json ({reason})"
            ) from None
    check_family(str(directory), whole.to_dict())
    return whole


def forget_quantization(*configs: Any) -> None:
    """Let configs be of the model that is made of quantized files: all it is, saved or laid out
    again, is not quantized. Half precision becomes bfloat16, which is what it is computed in.
    """
    found = [config.__dict__.pop(key, None) for config in configs for key in QUANTIZATION_KEYS]
    for config in configs:
        if any(found) and getattr(config, "dtype", None) == torch.float16:
            config.dtype = torch.bfloat16


def is_tied(directory: Path, architecture: Architecture) -> bool:
    """Return whether the head is the embedding: of GGUF by its file, of others where config.json
    says so and the files hold no other.
    """
    stored = stored_tensors(directory)
    if GGUF_EMBEDDING in stored:
        return GGUF_HEAD not in stored
    return architecture.tied and not has_own_head(directory, architecture)


def has_own_head(directory: Path, architecture: Architecture) -> bool:
    """Return whether the files hold a head other than the embedding that config.json ties it to.

    transformers 5 then unties them.
    """
    stored = stored_tensors(directory)
    path = f".{architecture.family.head}."
    found = {f".{name}".partition(path)[2] for name in stored if path in f".{name}"}
    if "weight" not in found:
        return bool(found & PACKED_HEADS)
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
            stream=stream_of(config, model.get_submodule(family.layers)),
            alibi=alibi_of(config),
        )
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = f"it cannot be laid out ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise refuse(path, config.model_type, reason) from None


def vision_architecture(whole: Any, path: str) -> Architecture:
    """Return the architecture of a model with its vision tower.

    Raises:
        ConfigError: there is no record of it, or it cannot be laid out.
    """
    tower, text = getattr(whole, "vision_config", None), whole.get_text_config()
    vision = vision_family(path, whole.model_type, getattr(tower, "model_type", None))
    language = LANGUAGE_FAMILIES.get(text.model_type) or FAMILIES.get(text.model_type)
    if language is None:
        reason = f'[vision]: its language model is a "{text.model_type}", which has no record'
        raise refuse(path, whole.model_type, reason)
    family = within(language, vision.language)
    try:
        with transformers_reads(path):
            model, attention = lay_out_first(whole, path, AutoModelForImageTextToText)
        ends: Any = model
        head, embedding = ends.get_output_embeddings(), ends.get_input_embeddings()
        whole.tie_word_embeddings = text.tie_word_embeddings = head.weight is embedding.weight
        return Architecture(
            family=family,
            config=text,
            attention=attention,
            windows=attention_windows(text, family, path),
            rotary_types=rotary_types(text, model, family),
            stateful=[False] * text.num_hidden_layers,
            router=find_router(model.get_submodule(vision.language)),
            stream=stream_of(text, model.get_submodule(family.layers)),
            vision=vision,
            whole=whole,
        )
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = f"it cannot be laid out ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise refuse(path, whole.model_type, reason) from None


def within(family: Family, language: str) -> Family:
    """Return the record of a language model that lies in a larger one, under a path."""
    inner = [family.embedding, family.layers, family.norm, family.rotary]
    embedding, layers, norm, rotary = (
        None if path is None else f"{language}.{path.partition('.')[2]}" for path in inner
    )
    assert embedding is not None and layers is not None
    return replace(family, embedding=embedding, layers=layers, norm=norm, rotary=rotary)


def lay_out(architecture: Architecture) -> nn.Module:
    """The whole model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = architecture.model_class.from_config(
            architecture.model_config, attn_implementation=architecture.attention
        )
    return model


def lay_out_first(
    config: Any, path: str, kind: Any = AutoModelForCausalLM
) -> tuple[nn.Module, str]:
    """The model on the meta device, and the fastest attention that it can be laid out with.

    Args:
        kind: transformers' class that lays it out.
    """
    reason = ""
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                return kind.from_config(config, attn_implementation=attention), attention
        except (
            TypeError,
            ValueError,
        ) as error:  # this attention, or this architecture, is not to be had
            reason = str(error).splitlines()[0]
    raise refuse(path, config.model_type, reason)


def attention_windows(config: Any, family: Family, path: str) -> list[int | None]:
    """Each layer's attention window; None reaches back to the start."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window_of(config, "sliding_attention")] * layer_count(config)
    if config.model_type in UNSUPPORTED:
        raise refuse(path, config.model_type, UNSUPPORTED[config.model_type])
    known = known_types(config) | (STATE_TYPES | OTHER_TYPES if family.states else set())
    unknown = set(types) - known
    if unknown:
        raise refuse(path, config.model_type, f"layers of type {', '.join(sorted(unknown))}")
    return [window_of(config, kind) for kind in types]


def stateful_layers(config: Any, family: Family) -> list[bool]:
    """Return of each layer whether it has a state."""
    if family.states is None:
        return [False] * layer_count(config)
    if family.states.absent_from is not None:
        absent = getattr(config, family.states.absent_from)
        return [bool(getattr(config, str(family.states.only_if))) and not part for part in absent]
    return [has_state(kind) for kind in config.layer_types]


def rotary_types(config: Any, model: nn.Module, family: Family) -> list[str | None]:
    """Return each layer's rotary table, where there are several."""
    layers = layer_count(config)
    if family.rotary is None:
        return [None] * layers
    if isinstance(model.get_submodule(family.rotary), nn.ModuleList):
        return [str(theta) if theta else None for theta in config.layer_rope_theta]
    accepted = inspect.signature(model.get_submodule(family.rotary).forward).parameters
    if "layer_type" not in accepted:
        return [None] * layers
    types = list(config.layer_types)
    attention = next((kind for kind in types if not has_state(kind)), None)
    return [attention if has_state(kind) else kind for kind in types]


def discover(model: Any, path: str) -> Family:
    """A record for a model that has none: only if each of its parts has a place in the pipeline.

    Raises:
        ConfigError: naming the part without one.
    """
    model_type, layers = model.config.model_type, layer_count(model.config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    body = body_of(model)
    if body is None or head is None:
        raise refuse(path, model_type, "it has no separate body and head")
    ends = ends_of(model, model_type)
    for key, what in ends.refused.items():
        if getattr(model.config, key):
            raise refuse(path, model_type, f"{key} in config.json ({what})")
    found: dict[str, str] = {}
    for full, part in parts_of(model, body):
        if full in ends.first + ends.last:
            continue
        if isinstance(part, nn.Dropout) and part.p and ends.dropout is None:
            reason = f"the pipeline has no place for its part {full}, a dropout of {part.p}"
            raise refuse(path, model_type, reason)
        if part is head:
            found["head"] = full
        elif part is embedding:
            found["embedding"] = full
        elif isinstance(part, nn.ModuleList) and len(part) == layers:
            found["layers"] = full
        elif is_rotary(part):
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
        norm=found.get("norm", ends.norm),  # one that has both places is met as the first
        rotary=found.get("rotary"),
        head=found["head"],
        states=STATE_LAYERS.get(model_type),
        embedding_root=root_of(model.get_submodule(body)),
        embedding_dropout=ends.dropout,
        ends=ends,
        **published_scales(model.config),
    )


def is_rotary(part: nn.Module) -> bool:
    """Return whether a module makes rotary tables, or is a list of such."""
    parts = list(part) if isinstance(part, nn.ModuleList) else [part]
    return bool(parts) and all("rotary" in type(one).__name__.lower() for one in parts)


def body_of(model: Any) -> str | None:
    """Return the path of the part of a model that has embedding and layers; None without one."""
    embedding, path = model.get_input_embeddings(), None
    inner = model
    while embedding not in inner.children():
        found = [name for name, part in inner.named_children() if embedding in part.modules()]
        if not found:
            return None
        path = found[0] if path is None else f"{path}.{found[0]}"
        inner = model.get_submodule(path)
    return path


def parts_of(model: nn.Module, body: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a model's body, and those beside it, by their paths."""
    for name, part in model.get_submodule(body).named_children():
        yield f"{body}.{name}", part
    while body:
        outer, _, inner = body.rpartition(".")
        for name, part in model.get_submodule(outer).named_children():
            if name != inner:
                yield f"{outer}.{name}" if outer else name, part
        body = outer


def root_of(body: nn.Module) -> str | None:
    """Return the config key whose root embeddings are multiplied by, if they are."""
    return "hidden_size" if hasattr(body, NORMALIZER) else None


def published_scales(config: Any) -> dict[str, Any]:
    """The config keys that scale or cap what flows between the parts of a model, by what they do.

    Whether this model goes by them, its trial shows.
    """
    return {
        what: key for what, keys in SCALES.items() for key in keys if getattr(config, key, None)
    }
