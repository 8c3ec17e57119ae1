"""Builds one stage of a Hugging Face model, adapters included, and loads only its own weights."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train_config import AdapterConfig, TrainConfig
from headrace.trainer.acceleration import accelerate, attention_name
from headrace.trainer.families import Family, require_family
from headrace.trainer.partition import cut
from headrace.trainer.stage import Stage
from headrace.trainer.weights import WeightFiles

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that the optimiser steps, under its name in the whole model.

    `owned` is false for the copy of a tied embedding that the last stage keeps as its head: it is
    stepped there as well, but counted, clipped by and saved from the first stage only.
    """

    name: str
    parameter: nn.Parameter
    owned: bool


@dataclass(frozen=True)
class BuiltStage:
    """A stage with its weights, and what training it needs to know."""

    stage: Stage
    trained: list[TrainedParameter]
    tied_copy: nn.Parameter | None  # a trained tied embedding, or the last stage's copy of it
    tied_head: nn.Parameter | None  # single stage: the head, over the memory of `tied_copy`
    model_config: Any
    lora_config: LoraConfig | None
    layers: range


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of frozen weights and of the computation."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def trained_dtype(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """The type of trained weights, given that of the computation."""
    return dtype if config.optimizer.type == "adamw_kahan" else torch.float32


def lora_config(adapter: AdapterConfig, model: str) -> LoraConfig | None:
    """The adapter in PEFT's terms; None when all weights are trained."""
    if adapter.kind == "none":
        return None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
    )


def build_stage(config: TrainConfig, stage: int, device: torch.device) -> BuiltStage:
    """Lay the whole model out without memory, keep this stage's modules, and load their weights.

    Raises:
        ConfigError: target modules that match nothing.
        DataError: weights missing or of another shape than config.json says.
    """
    model_config = AutoConfig.from_pretrained(config.model, local_files_only=True)
    family = require_family(model_config.model_type, config.model)
    layers = cut(model_config, config.pipeline_stages)[stage]
    adapter = lora_config(config.adapter, config.model)
    dtype = compute_dtype(config, device)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            model_config, attn_implementation=attention_name(config, model_config, device)
        )
        rotary_type = type(model.get_submodule(family.rotary))
        if adapter is not None:
            model = add_adapter(model, adapter, family)
    prefix = PEFT_PREFIX if adapter is not None else ""
    first, last = stage == 0, stage == config.pipeline_stages - 1
    layer_names = [f"{prefix}{family.layers}.{index}" for index in layers]
    names = (
        [prefix + family.embedding] * first
        + layer_names
        + [prefix + family.norm, prefix + family.head] * last
    )
    modules = {name: model.get_submodule(name) for name in names}
    built = Stage(
        modules,
        embedding=prefix + family.embedding if first else None,
        layers=layer_names,
        norm=prefix + family.norm if last else None,
        head=prefix + family.head if last else None,
        rotary=rotary_type(config=model_config).to(device),
        compute_dtype=dtype,
        autocast=adapter is None and trained_dtype(config, dtype) != dtype,
        recompute=config.activation_checkpointing == "full",
        seeded=config.adapter.dropout > 0 or getattr(model_config, "attention_dropout", 0) > 0,
    )
    loader = _Materializer(
        config, dtype, device, tied=model_config.tie_word_embeddings, family=family
    )
    trained, tied_head = loader.fill(built)
    accelerate(built, config, model_config, device)
    tied_name = f"{family.embedding}.weight" if model_config.tie_word_embeddings else None
    return BuiltStage(
        stage=built,
        trained=trained,
        tied_copy=next((item.parameter for item in trained if item.name == tied_name), None),
        tied_head=tied_head,
        model_config=model_config,
        lora_config=adapter,
        layers=layers,
    )


def add_adapter(model: nn.Module, adapter: LoraConfig, family: Family) -> nn.Module:
    """Wrap the model in PEFT's adapters, as PEFT itself would."""
    if isinstance(adapter.target_modules, list | set):
        outside = {"embed_tokens", "lm_head"} & {
            name.rsplit(".", 1)[-1] for name in adapter.target_modules
        }
        if outside:
            raise ConfigError(
                f"adapter.target_modules: {', '.join(sorted(outside))} cannot have adapters yet; "
                "name linear layers inside the decoder layers"
            )
    try:
        wrapped: nn.Module = get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"adapter.target_modules = {adapter.target_modules}: {error}") from None
    return wrapped


class _Materializer:
    """Gives every parameter of a stage its memory and its values, one at a time."""

    def __init__(
        self,
        config: TrainConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tied: bool,
        family: Family,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.tied = tied
        self.family = family

    def fill(self, stage: Stage) -> tuple[list[TrainedParameter], nn.Parameter | None]:
        """Load or initialise all parameters; returns the trained ones and a tied head, if any."""
        trained: list[TrainedParameter] = []
        tied_head = None
        random = self.config.weights == "random"
        with nullcontext() if random else WeightFiles(Path(self.config.model)) as files:
            for prefix, module in stage.names.items():
                for owner_name, owner in module.named_modules():
                    for attribute, empty in list(owner._parameters.items()):
                        if empty is None:
                            continue
                        name = ".".join(part for part in (prefix, owner_name, attribute) if part)
                        is_tied = self.tied and name.endswith(self.family.head + ".weight")
                        if is_tied and stage.embedding is not None:
                            tied_head = self._share(stage, owner, attribute)
                            continue
                        parameter = self._parameter(name, empty, files, is_tied)
                        owner._parameters[attribute] = parameter
                        if parameter.requires_grad:
                            canonical = self.family.embedding + ".weight" if is_tied else name
                            trained.append(
                                TrainedParameter(canonical, parameter, owned=not is_tied)
                            )
        left = [name for name, tensor in stage.named_parameters() if tensor.is_meta]
        left += [name for name, tensor in stage.named_buffers() if tensor.is_meta]
        assert not left, f"not loaded: {left}"
        return trained, tied_head

    def _parameter(
        self, name: str, empty: Tensor, files: WeightFiles | None, is_tied: bool
    ) -> nn.Parameter:
        dtype = trained_dtype(self.config, self.dtype) if empty.requires_grad else self.dtype
        stored = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if is_tied and (files is None or stored not in files):
            stored = self.family.embedding + ".weight"
        if ".lora_" in name:
            values = initial_adapter(name, empty.shape, self.config.seed)
        elif files is None:
            values = initial_weight(stored, empty.shape, self.config.seed, self.device)
        else:
            values = files.read(stored, empty.shape)
        return nn.Parameter(values.to(self.device, dtype), requires_grad=empty.requires_grad)

    def _share(self, stage: Stage, owner: nn.Module, attribute: str) -> nn.Parameter | None:
        """Let the head use the embedding's memory; trained, it keeps a gradient of its own."""
        assert stage.embedding is not None
        weight: nn.Parameter = stage.embedding.weight  # type: ignore[assignment]
        if not weight.requires_grad:
            owner._parameters[attribute] = weight
            return None
        head = nn.Parameter(weight.data)
        owner._parameters[attribute] = head
        return head


def initial_weight(name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Ones for vectors (norms), else normal with deviation 0.02; made on the device."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "weight", name) >> 1)
    return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """PEFT's initial LoRA weights: A uniform in +-1/sqrt(fan in), B zero; same in every layout."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
