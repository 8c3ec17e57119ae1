"""Builds one stage of a Hugging Face model, adapters included, and loads only its own weights."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.model_config import SHARD, ModelConfig
from headrace.trainer.adapters.history import AdapterHistory
from headrace.trainer.adapters.names import rows_name
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import flops_per_token
from headrace.trainer.building.partition import StageCut, partition
from headrace.trainer.building.reference import reference_of
from headrace.trainer.layers.sequence_attention import share_rows
from headrace.trainer.layers.weight_offload import (
    HostMemory,
    SharedMemory,
    WeightOffload,
    find_weights,
)
from headrace.trainer.quantized.selection import check_fp8_device
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.acceleration import accelerate
from headrace.trainer.stage.sliced_attention import slice_rows
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.stage.stage import Stage
from headrace.trainer.stage.tiled_mlp import tile_mlps
from headrace.trainer.tensor_parallel.cut_stage import connect_ranks
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard
from headrace.trainer.tensor_parallel.weight_cut import join_cuts


def build_stage(
    config: ModelConfig,
    stage: int,
    device: torch.device,
    plan: Plan,
    sequence: SequenceSlice = WHOLE,
    shard: TensorShard = WHOLE_WEIGHTS,
    copies_group: Any = None,
) -> BuiltStage:
    """Keep a stage's modules of a whole model without memory, and load their weights.

    Args:
        stage: of an interleaved schedule, the part of the model.
        plan: of this config.
        sequence: the slice of every row that the stage is to hold.
        shard: the part of the weights that it is to hold.
        copies_group: the ranks that are to hold the same weights, over the device's backend, among
            which `weight_shard` shares them out; None holds them whole.

    Raises:
        ConfigError: the device, or the cut, does not go with the config.
        DataError: weights missing or of another shape than config.json says.
    """
    check_fp8_device(config, device)
    if copies_group is None:
        config = config.model_copy(update={"weight_shard": "none"})
    cut = StageCut(stage, config.parts, partition(config, plan.size)[stage])
    spec, filled = fill_stage(config, plan, cut, device, sequence, shard)
    spec = replace(spec, weight_offload=offloaded(spec, config, device, copies_group))
    reference = None
    if config.objective.has_reference:
        reference = construct(reference_of(spec, plan, config, cut, device), config, device).eval()
    elif plan.teacher is not None:
        of_teacher = config.of_teacher()
        spec_of_teacher = teacher_of(plan.teacher, of_teacher, stage, device)
        reference = construct(spec_of_teacher, of_teacher, device).eval()
    built = construct(spec, config, device, reference)
    embedding = plan.architecture.family.embedding
    shared = {f"{embedding}.weight", rows_name(plan.method.prefix, embedding)}
    tied = [p.parameter for p in filled.trained if p.name in shared and plan.architecture.tied]
    return BuiltStage(
        chunks=[built],
        trained=filled.trained,
        tied_copy=next(iter(tied), None),
        tied_head=filled.tied_head,
        model_config=plan.architecture.config,
        method=plan.method,
        layers=[cut.layers],
        architecture=plan.architecture,
        skeleton=plan.plain,
        history=AdapterHistory(filled.initial),
        cuts=spec.cuts,
        flops_per_token=flops_per_token(plan.size, plan.method.trains_all),
    )


def construct(
    spec: StageSpec, config: ModelConfig, device: torch.device, reference: Stage | None = None
) -> Stage:
    """Return the stage of filled modules, with the faster parts that the config allows."""
    faster = accelerate(spec, config, device)
    if config.tiles > 1:
        tile_mlps(spec.layer_modules, config.tiles, keeps_chance=spec.seeded)
    if config.sequence_slices > 1:
        slice_rows(spec.layer_modules)
    share_rows(spec.tree.modules(), spec.sequence)
    connect_ranks(spec.modules, spec.cuts)
    return Stage(replace(spec, acceleration=faster), reference)


def offloaded(
    spec: StageSpec, config: ModelConfig, device: torch.device, copies_group: Any
) -> WeightOffload | None:
    """Leave the weights that the config names where they are held, and return what brings them.

    Raises:
        ConfigError: no layer of the model has such weights.
    """
    key, wish = config.moved_weights
    if wish == "none":
        return None
    source = SharedMemory(device, copies_group) if key == SHARD else HostMemory(device)
    layers = list(zip(spec.names.layers, spec.layer_modules, strict=True))
    if layers and not any(find_weights(name, layer, wish) for name, layer in layers):
        raise ConfigError(
            f'{key} = "{wish}": the layers of this model have no frozen part of that name; drop it'
        )
    return WeightOffload(layers, wish, device, source)


def build_chunks(
    config: ModelConfig,
    stage: int,
    device: torch.device,
    plan: Plan,
    sequence: SequenceSlice = WHOLE,
    shard: TensorShard = WHOLE_WEIGHTS,
    copies_group: Any = None,
) -> BuiltStage:
    """Build the parts of the model that a stage holds: every n-th of n stages.

    Raises:
        ConfigError, DataError: as `build_stage`.
    """
    mine = range(stage, config.parts, config.pipeline_stages)
    return join(
        [build_stage(config, part, device, plan, sequence, shard, copies_group) for part in mine]
    )


def join(built: Sequence[BuiltStage]) -> BuiltStage:
    """Several parts of one model as one."""
    return replace(
        built[0],
        chunks=list(chain.from_iterable(part.chunks for part in built)),
        trained=list(chain.from_iterable(part.trained for part in built)),
        tied_copy=next((part.tied_copy for part in built if part.tied_copy is not None), None),
        layers=list(chain.from_iterable(part.layers for part in built)),
        cuts=join_cuts([part.cuts for part in built]),
        history=AdapterHistory(
            {name: value for part in built for name, value in part.history.initial.items()}
        ),
    )


def teacher_of(plan: Plan, config: ModelConfig, stage: int, device: torch.device) -> StageSpec:
    """A stage of the model that an objective learns from, whole and frozen.

    Args:
        plan: of the teacher.
        config: by which it is laid out, `TrainConfig.of_teacher`.

    Raises:
        DataError: its weights are not there.
    """
    plan.model.requires_grad_(False)
    cut = StageCut(stage, config.parts, partition(config, plan.size)[stage])
    spec, _ = fill_stage(config, plan, cut, device)
    return replace(spec, autocast=False, router_loss=None, recompute=frozenset())
