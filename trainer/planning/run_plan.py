"""A run laid out on GPUs before there is one: what each stage holds and does."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer import devices
from headrace.trainer.architecture.half_layer import Half, Span
from headrace.trainer.building.assembly import base_prefix
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import ModelSize, PartSize, measure
from headrace.trainer.building.partition import PATCHES_PER_TOKEN, partition
from headrace.trainer.planning.layer_activations import lay_out_part, layer_activations
from headrace.trainer.planning.memory_model import (
    NO_TOWER,
    LayerActivations,
    StageMemory,
    TowerActivations,
    parts_of_stage,
    stage_memory,
)
from headrace.trainer.planning.planned_run import RunPlan, StagePlan
from headrace.trainer.planning.tower_activations import tower_activations
from headrace.trainer.stage.acceleration import runs_without_masks
from headrace.trainer.tensor_parallel.cut_stage import cut_stage
from headrace.trainer.tensor_parallel.shard import TensorShard


def plan_run(
    config: TrainConfig,
    plan: Plan,
    gpus: int,
    sequence_len: int | None = None,
    activations: LayerActivations | None = None,
    size: ModelSize | None = None,
) -> RunPlan:
    """Lay a run out on GPUs.

    Args:
        plan: the model of the config.
        sequence_len: None takes the one of the first dataset.
        activations: of a layer, where they were counted for a run with the same rows and plan.
        size: of what a rank holds of the model, where it was measured for such a plan.

    Raises:
        ConfigError, DataError: layout or datasets that do not fit.
    """
    dims = config.dims(gpus)
    length = sequence_len or read_manifest(Path(config.datasets[0].path)).sequence_len
    dtype = devices.compute_dtype(config.dtype, devices.PLANNED)
    size = size or size_of_rank(plan, config.tensor_parallel)
    activations = activations or count_activations(plan, config, dtype, length)
    cut = partition(config, plan.size)
    stages, copies = dims.stages, dims.replicas * dims.sequence
    mine = share_of_activations(config, plan, activations, dtype, length)
    return RunPlan(
        config,
        plan,
        dims.replicas,
        length,
        activations,
        size,
        [
            stage_plan(plan, config, size, cut[n::stages], n, mine, dtype, length, copies)
            for n in range(stages)
        ],
    )


def count_activations(
    plan: Plan, config: TrainConfig, dtype: torch.dtype, sequence_len: int
) -> LayerActivations:
    """Count what decoder layers and a vision tower keep for the backward pass."""
    tower = count_tower(plan, config, dtype, sequence_len)
    return replace(layer_activations(plan, config, dtype, sequence_len), tower=tower)


def count_tower(
    plan: Plan, config: TrainConfig, dtype: torch.dtype, sequence_len: int
) -> TowerActivations:
    """Count what a vision tower keeps, of which anything is trained."""
    if plan.size.vision is None or not plan.size.vision.trained:
        return NO_TOWER
    stage, _ = lay_out_part(plan, config, Span(0, 0), dtype, number=0)
    assert stage.tower is not None
    return tower_activations(
        plan, config, dtype, sequence_len, stage.tower, autocast=stage.autocast
    )


def size_of_rank(plan: Plan, ranks: int) -> ModelSize:
    """Measure what one of the ranks that share weights holds of a model.

    Raises:
        ConfigError: weights that they do not divide.
    """
    if ranks == 1:
        return plan.size
    prefix = base_prefix(plan)
    cuts = cut_stage({"": plan.model}, plan.architecture, prefix, TensorShard(0, ranks)).cuts
    named = plan.model.named_parameters(remove_duplicate=False)
    shared = {id(parameter): ranks for name, parameter in named if name in cuts}
    return measure(plan.model, plan.architecture, plan.prefix, shared)


def share_of_activations(
    config: TrainConfig,
    plan: Plan,
    activations: LayerActivations,
    dtype: torch.dtype,
    sequence_len: int,
) -> LayerActivations:
    """Return what a rank keeps of a layer, of what whole rows would."""
    settings = plan.architecture.config
    heads = settings.num_attention_heads
    key_heads = getattr(settings, "num_key_value_heads", None) or heads
    key_heads = max(1, key_heads // config.tensor_parallel)
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    key_bytes = 2 * key_heads * head_size * config.places * sequence_len * dtype.itemsize
    shared = activations.shared(config.sequence_parallel, key_bytes, key_heads)
    ranks = config.sequence_parallel
    repeats = ranks // math.gcd(ranks, key_heads)
    return replace(shared, keys=key_bytes * repeats / ranks)


def stage_plan(
    plan: Plan,
    config: TrainConfig,
    size: ModelSize,
    layers: list[Span],
    stage: int,
    activations: LayerActivations,
    dtype: torch.dtype,
    sequence_len: int,
    copies: int,
) -> StagePlan:
    """One stage."""
    parts = parts_of_stage(config, size, layers, stage)
    work = sum(
        layer_work(plan, config, index, half, size, sequence_len)
        for chunk in layers
        for index, half in chunk.pieces()
    )
    if stage == 0 and size.vision is not None:
        work += tower_work(size.vision, again=config.activation_checkpointing != "none")
    if stage == config.pipeline_stages - 1:
        work += size.head.active * (6 if size.head.trained else 4)
    memory = stage_memory(config, size, layers, stage, activations, dtype, sequence_len, copies)
    return StagePlan(
        layers=layers,
        weights=sum(part.weights for part in parts),
        trained=sum(part.trained for part in parts),
        memory=without_masks(plan, config, dtype, memory),
        work=work,
    )


def without_masks(
    plan: Plan, config: TrainConfig, dtype: torch.dtype, memory: StageMemory
) -> StageMemory:
    """Leave masks out where the documents' bounds take their place."""
    by_bounds = config.kernels != "torch" and runs_without_masks(plan.architecture, dtype)
    return replace(memory, masks=0.0) if by_bounds else memory


def tower_work(vision: PartSize, *, again: bool) -> float:
    """Floating-point operations of a vision tower for one token of a row, by the patches that it
    sees for each; frozen, it has no backward pass.
    """
    passes = 1 + (2 + again) * bool(vision.trained)
    return 2 * vision.active * PATCHES_PER_TOKEN * passes


def layer_work(
    plan: Plan,
    config: TrainConfig,
    index: int,
    half: Half | None,
    size: ModelSize,
    sequence_len: int,
) -> float:
    """Floating-point operations of a layer, or half of it, for one token, forward and backward.

    Each weight multiplies once forward and once for the gradient of its input, and a trained one
    once more; recomputation repeats the first. Attention is causal, over whole rows or its window.
    """
    part, settings = size.piece(index, half), plan.architecture.config
    recomputed = index in recomputed_layers(config.activation_checkpointing, len(size.layers))
    frozen_share = 1 - min(1.0, part.trained / max(1.0, part.active))
    weight_passes = 2 + (1 - frozen_share) + recomputed
    heads = getattr(settings, "num_attention_heads", None) or 1
    width = heads * (getattr(settings, "head_dim", None) or settings.hidden_size // heads)
    width //= config.tensor_parallel
    window = plan.architecture.windows[index] or sequence_len
    attends = plan.architecture.attends[index] and half != "mlp"
    seen = min(window, sequence_len / 2) if attends else 0.0
    again = recomputed and config.activation_checkpointing != "attention"
    attention_passes = 3 + again  # forward once, backward two products for each of two
    work = 2 * part.active * weight_passes + 4 * seen * width * attention_passes
    if config.tiles > 1 and half != "attention":  # each MLP runs once more
        work += 2 * (size.piece(index, "mlp") if size.halves else part).active
    return work
