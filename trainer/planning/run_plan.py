"""A run laid out on GPUs before there is one: what each stage holds and does."""

from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer import devices
from headrace.trainer.architecture.half_layer import Half, Span
from headrace.trainer.architecture.precision import compute_dtype
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import ModelSize
from headrace.trainer.building.partition import partition
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.planning.layer_activations import LayerActivations, layer_activations
from headrace.trainer.planning.memory_model import StageMemory, parts_of_stage, stage_memory

GIB = 1 << 30


@dataclass(frozen=True)
class StagePlan:
    """One process of a replica."""

    layers: list[Span]  # of each chunk
    weights: int  # parameters
    trained: int
    memory: StageMemory
    work: float  # floating-point operations a token


@dataclass(frozen=True)
class RunPlan:
    """One replica, and how well its stages work together."""

    config: TrainConfig
    plan: Plan
    replicas: int
    sequence_len: int
    activations: LayerActivations
    stages: list[StagePlan]

    @property
    def peak(self) -> float:
        """Bytes of the fullest process."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def layout(self) -> str:
        """Return the sizes of the parallel dimensions, beside the stages."""
        shares = self.config.sequence_parallel
        rows = f", whose rows {shares} ranks share" if shares > 1 else ""
        return f"{self.replicas} replica(s){rows}"

    @property
    def bubble(self) -> float:
        """Share of the time in which a stage waits for the pipeline to fill and drain."""
        waiting = self.config.pipeline_stages - 1
        chunks = self.config.parts // self.config.pipeline_stages
        return waiting / (self.config.gradient_accumulation_steps * chunks + waiting)

    @property
    def balance(self) -> float:
        """Work of the mean stage over that of the slowest."""
        work = [stage.work for stage in self.stages]
        return sum(work) / len(work) / max(work)

    @property
    def efficiency(self) -> float:
        """Share of the time in which the mean stage computes; transfers left out."""
        return self.balance * (1 - self.bubble)


def plan_run(
    config: TrainConfig,
    gpus: int,
    sequence_len: int | None = None,
    plan: Plan | None = None,
    activations: LayerActivations | None = None,
) -> RunPlan:
    """Lay a run out on GPUs.

    Args:
        sequence_len: None takes the one of the first dataset.
        plan: the model, where several runs of it are planned.
        activations: of a layer, where they were counted for a run with the same rows and plan.

    Raises:
        ConfigError, DataError: model or datasets that do not fit.
    """
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel = {config.tensor_parallel}: its memory is not counted yet; plan "
            "with 1, which is more than each process will need"
        )
    dims = config.dims(gpus)
    length = sequence_len or read_manifest(Path(config.datasets[0].path)).sequence_len
    plan = plan or plan_model(config)
    dtype = compute_dtype(config, devices.PLANNED)
    size = plan.size
    activations = activations or layer_activations(plan, config, dtype, length)
    cut = partition(config, size)
    stages, copies = dims.stages, dims.replicas * dims.sequence
    mine = share_of_activations(config, plan, activations, dtype, length)
    return RunPlan(
        config,
        plan,
        dims.replicas,
        length,
        activations,
        [
            stage_plan(plan, config, size, cut[n::stages], n, mine, dtype, length, copies)
            for n in range(stages)
        ],
    )


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
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    key_bytes = 2 * key_heads * head_size * config.places * sequence_len * dtype.itemsize
    return activations.shared(config.sequence_parallel, key_bytes, key_heads)


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
    if stage == config.pipeline_stages - 1:
        work += size.head.active * (6 if size.head.trained else 4)
    return StagePlan(
        layers=layers,
        weights=sum(part.weights for part in parts),
        trained=sum(part.trained for part in parts),
        memory=stage_memory(config, size, layers, stage, activations, dtype, sequence_len, copies),
        work=work,
    )


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
    window = plan.architecture.windows[index] or sequence_len
    attends = plan.architecture.attends[index] and half != "mlp"
    seen = min(window, sequence_len / 2) if attends else 0.0
    attention_passes = 3 + recomputed  # forward once, backward two products for each of two
    return 2 * part.active * weight_passes + 4 * seen * width * attention_passes
