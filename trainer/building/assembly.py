"""Puts the modules of one stage together; their parameters have no memory yet."""

from typing import Any

import torch
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.names import base_name
from headrace.trainer.architecture.families_state import mixer_of
from headrace.trainer.architecture.half_layer import half_of
from headrace.trainer.building.held_values import trained_dtype
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.parameter_slots import (
    find_buffers,
    find_slots,
    holds_quantized,
)
from headrace.trainer.building.partition import StageCut
from headrace.trainer.layers.activation_offload import ActivationOffload
from headrace.trainer.layers.router_loss import RouterLossSettings, count_routers
from headrace.trainer.layers.selective_checkpoint import KeptAttention
from headrace.trainer.layers.state_mixers import restart_at_documents, take_one_row
from headrace.trainer.quantized.fp8_training import multiply_trained_in_fp8
from headrace.trainer.quantized.modules import QuantizableModule
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.distance_biases import take_rows
from headrace.trainer.stage.spec import StageNames, StageSpec
from headrace.trainer.tensor_parallel.cut_stage import cut_stage
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard
from headrace.trainer.vision.tower import VisionTower


def assemble(
    plan: Plan,
    config: ModelConfig,
    cut: StageCut,
    dtype: torch.dtype,
    device: torch.device,
    initial: nn.Module,
    *,
    trains: bool = True,
    sequence: SequenceSlice = WHOLE,
    shard: TensorShard = WHOLE_WEIGHTS,
) -> StageSpec:
    """Return a stage whose parameters have no memory yet; its buffers have, and initial values.

    Args:
        initial: made by `lay_out_with_buffers` for this stage alone, which takes parts of it.
        trains: there will be backward passes, for which activations are kept or recomputed.
        sequence: the slice of every row that is held here.
        shard: the part of the weights that is held here.
    """
    architecture, names = plan.architecture, stage_names(plan, cut)
    modules = take_modules(plan, names, cut, device, faster=config.kernels != "torch")
    if cut.is_first and config.embedding_on_cpu:
        check_embedding_on_cpu(plan, modules, names, alone=cut.is_last)
    seeded = config.adapter.dropout > 0 or architecture.uses_chance
    if any(half for _, half in cut.layers.pieces()):
        check_half_layers(plan, config, seeded=seeded)
    path = architecture.family.rotary
    rotary = None if path is None else initial.get_submodule(path)
    checkpointing = config.activation_checkpointing if trains else "none"

    def offload() -> ActivationOffload | None:
        return ActivationOffload(device) if config.activation_offload and trains else None

    spec = StageSpec(
        modules=modules,
        names=names,
        layers=list(cut.layers),
        rotary=None if rotary is None else rotary.to(device),
        architecture=architecture,
        router_loss=router_loss_settings(plan, config) if trains else None,
        compute_dtype=dtype,
        autocast=plan.method.trains_base and trained_dtype(config.optimizer, dtype) != dtype,
        recompute=recomputed_layers(checkpointing, architecture.layers),
        selective=checkpointing == "selective",
        kept_attention=KeptAttention(offload()) if checkpointing == "attention" else None,
        offload=offload(),
        seeded=seeded,
        embedding_on_cpu=config.embedding_on_cpu,
        objective=plan.objective,
        noise_alpha=config.regularization.neftune_alpha,
        sequence=sequence,
        tower=tower_of(plan, config, names, modules, trains=trains),
        cuts=cut_stage(modules, architecture, base_prefix(plan), shard),
    )
    if config.trained_matmul == "fp8":
        for layer in spec.layer_modules:
            multiply_trained_in_fp8(layer, dtype)
    materialize_buffers(spec, initial, device)
    return spec


def base_prefix(plan: Plan) -> str:
    """Return the path of the base model in the whole one."""
    plain: Any = plan.plain
    prefix: str = plain.base_model_prefix
    return prefix


def stage_names(plan: Plan, cut: StageCut) -> StageNames:
    """Return the names of a stage's modules in the whole model, as the plan's method has them."""
    family, prefix = plan.architecture.family, plan.prefix
    return StageNames(
        embedding=prefix + family.embedding if cut.is_first else None,
        layers=[f"{prefix}{family.layers}.{index}" for index in cut.layers],
        norm=prefix + family.norm if cut.is_last and family.norm else None,
        head=prefix + family.head if cut.is_last else None,
        prefix=prefix,
        first=[prefix + path for path in family.ends.first] if cut.is_first else [],
        last=[prefix + path for path in family.ends.last] if cut.is_last else [],
        vision=[prefix + path for path in plan.vision_paths] if cut.is_first else [],
    )


def tower_of(
    plan: Plan,
    config: ModelConfig,
    names: StageNames,
    modules: dict[str, nn.Module],
    *,
    trains: bool,
) -> VisionTower | None:
    """Return what runs the vision tower, on the stage that has it."""
    vision = plan.architecture.vision
    if vision is None or not names.vision:
        return None
    again = trains and config.activation_checkpointing != "none"
    own = {name: modules[name] for name in names.vision}
    body = plan.model.get_submodule(plan.prefix + vision.body)
    return VisionTower(body, own, vision, again=again)


def take_modules(
    plan: Plan, names: StageNames, cut: StageCut, device: torch.device, *, faster: bool
) -> dict[str, nn.Module]:
    """Take a stage's modules out of the whole model; layers with a state restart at documents."""
    family = plan.architecture.family
    whole, prefix = plan.architecture, names.prefix
    modules = {
        name: whole.part(plan.model, name.removeprefix(prefix), prefix) for name in names.used
    }
    for name, (index, half) in zip(names.layers, cut.layers.pieces(), strict=True):
        if family.states is not None and plan.architecture.stateful[index]:
            mixer = mixer_of(modules[name], family.states)
            restart_at_documents(mixer)
            take_one_row(mixer, family.states.one_row if faster else None, device)
        take_rows(modules[name], plan.architecture.alibi)
        if half is not None:
            modules[name] = half_of(modules[name], family, half)
    return modules


def check_half_layers(plan: Plan, config: ModelConfig, *, seeded: bool) -> None:
    """Refuse what does not go with halves of layers.

    Raises:
        ConfigError: saying what to do.
    """
    if seeded:
        raise ConfigError(
            "half_layers does not go with dropout, whose choices belong to whole layers; "
            "use whole layers or set adapter.dropout = 0"
        )
    if not plan.method.in_halves:
        raise ConfigError(
            f'half_layers does not go with adapter.kind = "{config.adapter.kind}", which follows '
            "whole layers"
        )


def check_embedding_on_cpu(
    plan: Plan, modules: dict[str, nn.Module], names: StageNames, *, alone: bool
) -> None:
    """The embedding must be frozen, and its memory not be the head's.

    Raises:
        ConfigError: saying what to do.
    """
    assert names.embedding is not None
    if any(parameter.requires_grad for parameter in modules[names.embedding].parameters()):
        raise ConfigError(
            "embedding_on_cpu: the embedding is trained; drop it, or leave the embedding out of "
            "adapter.target_modules and modules_to_save"
        )
    if alone and plan.architecture.tied:
        raise ConfigError(
            "embedding_on_cpu: the head uses the same weights, which the only stage holds anyway; "
            "drop it"
        )


def materialize_buffers(spec: StageSpec, initial: nn.Module, device: torch.device) -> None:
    """Give buffers without memory the values that the model is constructed with."""
    moving = set(spec.moved)
    for prefix, part in spec.modules.items():
        home = device if part in moving else torch.device("cpu")
        for slot in find_buffers({prefix: part}):
            if slot.value.is_meta:
                slot.fill(initial.get_buffer(base_name(slot.name)).to(home, copy=True))


def router_loss_settings(plan: Plan, config: ModelConfig) -> RouterLossSettings | None:
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


def check_parts(config: ModelConfig, plan: Plan) -> None:
    """Refuse weights that the ranks do not divide, or that are held in a form that is not cut.

    Raises:
        ConfigError: naming one.
    """
    first = TensorShard(0, config.tensor_parallel)  # without a group: nothing is exchanged
    cuts = cut_stage({"": plan.model}, plan.architecture, base_prefix(plan), first).cuts
    for slot in find_slots({"": plan.model}):
        if slot.name in cuts and holds_quantized(slot) and plan.quantization is not None:
            assert isinstance(slot.owner, QuantizableModule)
            shape = slot.owner.as_held(slot.empty).shape
            plan.quantization.check_part(base_name(slot.name), shape, cuts[slot.name])
