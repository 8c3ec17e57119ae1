"""Builds one stage of a Hugging Face model, adapters included, and loads only its own weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.errors import ConfigError
from headrace.schemas.layer_ranges import recomputed_layers
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.model.acceleration import accelerate
from headrace.trainer.model.activation_offload import ActivationOffload
from headrace.trainer.model.adapters import (
    PEFT_PREFIX,
    adapter_layers,
    add_adapter,
    lora_config,
    select_trained,
    takes_over,
)
from headrace.trainer.model.architecture import (
    Architecture,
    architecture_of,
    lay_out,
    read_architecture,
)
from headrace.trainer.model.block_expansion import Expansion, expand
from headrace.trainer.model.control_adapter import add_control_adapters
from headrace.trainer.model.families import FAMILIES
from headrace.trainer.model.half_layer import half_of
from headrace.trainer.model.materializer import Materializer, TrainedParameter, trained_dtype
from headrace.trainer.model.model_directory import model_directory
from headrace.trainer.model.model_size import ModelSize, flops_per_token, measure, partition
from headrace.trainer.model.partition import Span
from headrace.trainer.model.quantization import (
    Quantization,
    install_holders,
    plan_quantization,
)
from headrace.trainer.model.quantized_cache import QuantizedCache
from headrace.trainer.model.reference import copy_weights, share_modules
from headrace.trainer.model.router_loss import RouterLossSettings, count_routers
from headrace.trainer.model.self_check import check_against_transformers
from headrace.trainer.model.stage import Stage, StageNames
from headrace.trainer.model.weight_index import weights_fingerprint
from headrace.trainer.model.weight_source import RandomWeights, StoredWeights, WeightSource


@dataclass(frozen=True)
class BuiltStage:
    """What one process holds, with its weights, and what training it needs to know."""

    chunks: list[Stage]  # in the order of the model; one, unless the schedule is interleaved
    trained: list[TrainedParameter]
    tied_copy: nn.Parameter | None  # a trained tied embedding, or the last stage's copy of it
    tied_head: nn.Parameter | None  # single stage: the head, over the memory of `tied_copy`
    model_config: Any
    lora_config: LoraConfig | None
    control: AdapterConfig | None  # of control adapters
    layers: list[Span]  # of each chunk
    architecture: Architecture
    skeleton: Any  # the whole model without adapters, on the meta device
    initial: dict[str, Tensor]  # adapters as they started, where they took over frozen weights
    expansion: Expansion | None
    flops_per_token: float = 0.0  # of the whole model, forward and backward
    merged: dict[str, Tensor] = field(default_factory=dict)  # by restarts: [restarts, ...] each

    @property
    def stage(self) -> Stage:
        """The only chunk."""
        (stage,) = self.chunks
        return stage

    @property
    def names(self) -> dict[str, nn.Module]:
        """Modules of all chunks by their names in the whole model, in order of use."""
        return {name: module for chunk in self.chunks for name, module in chunk.names.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of adapters beside their values, by names of its own."""
        merged = {f"merged/{name}": value for name, value in self.merged.items()}
        return merged | {f"initial/{name}": value for name, value in self.initial.items()}

    @property
    def width(self) -> int:
        """How many times the rank of the adapters the exported ones have."""
        restarts = max((len(values) for values in self.merged.values()), default=0)
        return 2 if self.initial else 1 + restarts


@dataclass(frozen=True)
class Plan:
    """A whole model on the meta device, and how it is run and trained."""

    architecture: Architecture
    plain: nn.Module  # without adapters, to know what names mean
    model: nn.Module  # with adapters
    lora: LoraConfig | None
    expansion: Expansion | None
    quantization: Quantization | None
    size: ModelSize  # taken before any stage is filled, which leaves quantised weights out
    control: AdapterConfig | None = None  # of control adapters

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the model itself are trained, and no adapters."""
        return self.lora is None and self.control is None

    @property
    def prefix(self) -> str:
        """Of the model's own names in the wrapped one."""
        return PEFT_PREFIX if self.lora is not None else ""


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of frozen weights and of the computation."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def build_stage(
    config: TrainConfig, stage: int, device: torch.device, plan: Plan | None = None
) -> BuiltStage:
    """Lay the whole model out without memory, keep this stage's modules, and load their weights.

    Args:
        plan: of this config, where several stages are built from one.

    Raises:
        ConfigError: an architecture that is not supported, adapters that match nothing.
        DataError: weights missing or of another shape than config.json says.
    """
    plan = plan or plan_model(config)
    dtype = compute_dtype(config, device)
    layers = partition(config, plan.size)[stage]
    built = assemble(plan, config, stage, layers, dtype, device)
    with weight_source(config, plan, device) as source:
        materializer = Materializer(
            config,
            plan.architecture,
            source,
            dtype,
            device,
            plan.expansion,
            plan.quantization,
            open_cache(config, plan, dtype, device),
        )
        filled = materializer.fill(built)
    if config.objective.has_reference:
        built.reference = reference_of(built, plan, config, stage, layers, device)
        accelerate(built.reference, config, plan.architecture, device)
    accelerate(built, config, plan.architecture, device)
    tied_name = materializer.embedding_name if plan.architecture.tied else None
    return BuiltStage(
        chunks=[built],
        trained=filled.trained,
        tied_copy=next((p.parameter for p in filled.trained if p.name == tied_name), None),
        tied_head=filled.tied_head,
        model_config=plan.architecture.config,
        lora_config=plan.lora,
        control=plan.control,
        layers=[layers],
        architecture=plan.architecture,
        skeleton=plan.plain,
        initial=filled.initial,
        flops_per_token=flops_per_token(plan.size, config.adapter.kind == "none"),
        expansion=plan.expansion,
    )


def plan_model(config: TrainConfig) -> Plan:
    """The whole model without memory, adapters included.

    Raises:
        ConfigError: as `build_stage`.
    """
    directory = model_directory(config.model)
    architecture, expansion = read_architecture(directory), None
    if architecture.config.model_type not in FAMILIES:
        check_against_transformers(architecture, str(directory))
    if config.adapter.kind == "blocks":
        larger, expansion = expand(architecture.config, config.adapter.blocks)
        architecture = architecture_of(larger, str(directory))
    plain = lay_out(architecture)
    quantization = plan_quantization(config, architecture, directory, plain)
    layers = architecture.config.num_hidden_layers
    lora = lora_config(config.adapter, plain, config.model, layers)
    model = install_holders(lay_out(architecture), quantization, architecture)
    if lora is not None:
        wrapped = add_adapter(model, lora)
        head = wrapped.get_submodule(PEFT_PREFIX + architecture.family.head)
        if architecture.tied and isinstance(head, LoraLayer) and takes_over(config.adapter):
            raise ConfigError(
                f'adapter.init = "{config.adapter.init}": the head is tied to the embedding, and '
                "nothing can be taken out of one alone; leave it out of target_modules"
            )
        size = measure(wrapped, architecture, PEFT_PREFIX)
        return Plan(architecture, plain, wrapped, lora, None, quantization, size)
    if config.adapter.kind == "control":
        wanted = adapter_layers(config.adapter, layers)
        model.requires_grad_(False)
        width = architecture.config.hidden_size
        add_control_adapters(
            model.get_submodule(architecture.family.layers), wanted, width, config.adapter
        )
        size = measure(model, architecture)
        return Plan(architecture, plain, model, None, None, quantization, size, config.adapter)
    if expansion is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(expansion.is_new(name, architecture.family.layers))
    else:
        select_trained(model, config.adapter, architecture.family.layers, layers)
    size = measure(model, architecture)
    return Plan(architecture, plain, model, None, expansion, quantization, size)


def assemble(
    plan: Plan,
    config: TrainConfig,
    stage: int,
    layers: Span,
    dtype: torch.dtype,
    device: torch.device,
) -> Stage:
    """A stage whose parameters have no memory yet; its rotary tables have."""
    family, architecture = plan.architecture.family, plan.architecture
    first, last = stage == 0, stage == config.pipeline_stages - 1
    names = StageNames(
        embedding=plan.prefix + family.embedding if first else None,
        layers=[f"{plan.prefix}{family.layers}.{index}" for index in layers],
        norm=plan.prefix + family.norm if last and family.norm else None,
        head=plan.prefix + family.head if last else None,
    )
    used = [names.embedding, *names.layers, names.norm, names.head]
    modules = {name: plan.model.get_submodule(name) for name in used if name}
    for name, (_, half) in zip(names.layers, layers.pieces(), strict=True):
        if half is not None:
            modules[name] = half_of(modules[name], family.attention, half)
    seeded = config.adapter.dropout > 0 or architecture.uses_chance
    in_halves = any(half for _, half in layers.pieces())
    if in_halves and seeded:
        raise ConfigError(
            "half_layers does not go with dropout, whose choices belong to whole layers; "
            "use whole layers or set adapter.dropout = 0"
        )
    if in_halves and config.adapter.kind == "control":
        raise ConfigError(
            'half_layers does not go with adapter.kind = "control", which follows whole layers'
        )
    rotary = None
    if family.rotary is not None:
        rotary = type(plan.plain.get_submodule(family.rotary))(config=architecture.config)
    stage_module = Stage(
        modules,
        names=names,
        layers=list(layers),
        rotary=None if rotary is None else rotary.to(device),
        architecture=architecture,
        router_loss=router_loss_settings(plan, config),
        compute_dtype=dtype,
        autocast=plan.trains_weights and trained_dtype(config, dtype) != dtype,
        recompute=recomputed_layers(
            config.activation_checkpointing, architecture.config.num_hidden_layers
        ),
        offload=ActivationOffload(device) if config.activation_offload else None,
        seeded=seeded,
    )
    stage_module.objective = config.objective
    stage_module.noise_alpha = config.regularization.neftune_alpha
    materialize_buffers(stage_module, plan.plain, device)
    return stage_module


def reference_of(
    policy: Stage,
    plan: Plan,
    config: TrainConfig,
    stage: int,
    layers: Span,
    device: torch.device,
) -> Stage:
    """A stage of the same layers without adapters, to be run without gradients.

    Under adapters it is made of the very modules that they wrap and takes no memory. Where the
    weights themselves are trained it holds a frozen copy of them, in their own type, so that it
    gives the same to the last bit until the first step.

    Args:
        policy: the stage that will be trained, with its initial weights.
    """
    model: Any = lay_out(plan.architecture)
    if plan.lora is not None:
        share_modules(policy, model)
    plain = replace(plan, model=model, lora=None)
    nothing_kept = {"activation_checkpointing": "none", "activation_offload": False}
    config = config.model_copy(update={"router_loss": 0.0, **nothing_kept})
    reference = assemble(plain, config, stage, layers, policy.compute_dtype, device)
    if plan.lora is None:
        copy_weights(policy, reference)
    reference.autocast, reference.seeded = policy.autocast, False
    return reference.eval()


def materialize_buffers(stage: Stage, model: Any, device: torch.device) -> None:
    """Buffers are not in checkpoints: each module's own initialisation says what they hold."""
    for module in stage.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if empty:
            model._init_weights(module)


def router_loss_settings(plan: Plan, config: TrainConfig) -> RouterLossSettings | None:
    """The routers' loss as config or model ask for it; None without routers or at 0."""
    architecture = plan.architecture
    coefficient = config.router_loss
    if coefficient is None:
        coefficient = float(getattr(architecture.config, "router_aux_loss_coef", 0.0) or 0.0)
    if architecture.router is None:
        if config.router_loss:
            raise ConfigError(f"router_loss = {config.router_loss}: the model has no routers")
        return None
    layers = count_routers(
        plan.plain.get_submodule(architecture.family.layers), architecture.router
    )
    if not coefficient or not layers:
        return None
    top_k = architecture.config.num_experts_per_tok
    return RouterLossSettings(architecture.router, coefficient, layers, top_k)


def weight_source(config: TrainConfig, plan: Plan, device: torch.device) -> WeightSource:
    """Files or chance, as the config says."""
    if config.weights == "random":
        return RandomWeights(plan.plain, config.seed, device)
    return StoredWeights(model_directory(config.model), plan.plain)


def open_cache(
    config: TrainConfig, plan: Plan, dtype: torch.dtype, device: torch.device
) -> QuantizedCache | None:
    """Where quantised layers are kept, if anywhere; a folder for all that decides on their bits."""
    settings, quantization = config.quantization, plan.quantization
    if settings is None or settings.cache is None or quantization is None:
        return None
    weights = f"random {config.seed}"
    if config.weights == "stored":
        weights = weights_fingerprint(model_directory(config.model))
    computed = str(quantization.compute_dtype(dtype))
    return QuantizedCache(Path(settings.cache), weights, settings, computed, device.type)
