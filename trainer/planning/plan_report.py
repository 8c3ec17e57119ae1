"""`headrace plan`: what each stage of a run will hold and do, before there is a run."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.quantization_config import QuantizationConfig
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
UNITS = {"": 1, "B": 1, "MB": 10**6, "MIB": 1 << 20, "GB": 10**9, "GIB": GIB}
SHOWN_REMEDIES = 4
NESTED = "optimizer."
SMALLEST = QuantizationConfig(backend="bnb", double_quantization=True)


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


def parse_size(text: str) -> float:
    """Bytes of `24GiB`, `80GB` or a plain number.

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f'--memory {text}: not a size; write for example "24GiB"')
    return float(match[1]) * UNITS[match[2].upper()]


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


def remedies(run: RunPlan, gpus: int, memory: float) -> Iterator[tuple[dict[str, Any], RunPlan]]:
    """Changes of the config with which the run fits, the mildest first."""
    config = run.config
    layers = run.plan.architecture.config.num_hidden_layers
    single: list[dict[str, Any]] = [
        {"partition": "memory"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "full", "activation_offload": True},
    ]
    if config.micro_batch_size > 1:
        rows = config.micro_batch_size * config.gradient_accumulation_steps
        single.append({"micro_batch_size": 1, "gradient_accumulation_steps": rows})
    if config.schedule == "interleaved":
        single.append({"schedule": "1f1b"})
    if config.optimizer.record.shardable and not config.relora.every_steps:
        single.append({"optimizer.shard": True})
    if config.optimizer.record.states is not None:
        single.append({"optimizer.offload": True})
    chunks = config.parts // config.pipeline_stages
    single += [
        {"pipeline_stages": stages}
        for stages in range(config.pipeline_stages + 1, min(gpus, layers // chunks) + 1)
        if gpus % stages == 0 and (chunks == 1 or config.gradient_accumulation_steps % stages == 0)
    ]
    single += [{"sequence_parallel": ranks} for ranks in more_slices(run, gpus)]
    if config.quantization is None and config.adapter.record.has_products:
        single.insert(2, {"quantization": SMALLEST})
    if not config.adapter.record.trains_base:
        single.append({"embedding_on_cpu": True})
        if not config.relora.every_steps:
            single.append({"weight_offload": "mlp"})
    new = [
        change
        for change in single
        if any(attrgetter(key)(config) != value for key, value in change.items())
    ]
    quantized_plan = None
    if {"quantization": SMALLEST} in new:
        quantized_plan = plan_model(config.model_copy(update={"quantization": SMALLEST}))
    counted = {(False, config.places): run.activations}
    for count in range(1, 4):
        for changes in combinations(new, count):
            change = {key: value for part in changes for key, value in part.items()}
            if len(change) < sum(map(len, changes)):
                continue  # two numbers of stages
            changed, quantized = with_changes(config, change), "quantization" in change
            if gpus % changed.replica_ranks:
                continue
            plan = quantized_plan if quantized else run.plan
            known = counted.get((quantized, changed.places))
            tried = plan_run(changed, gpus, run.sequence_len, plan, known)
            counted[quantized, changed.places] = tried.activations
            if tried.peak <= memory:
                yield change, tried


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return a config with other values for some keys, of which those of optimizers have a dot."""
    of_optimizer = {
        key.removeprefix(NESTED): value for key, value in changes.items() if key.startswith(NESTED)
    }
    others = {key: value for key, value in changes.items() if not key.startswith(NESTED)}
    if of_optimizer:
        others["optimizer"] = config.optimizer.model_copy(update=of_optimizer)
    return config.model_copy(update=others)


def more_slices(run: RunPlan, gpus: int) -> list[int]:
    """Return the numbers of ranks that could share rows, above that of the config."""
    heads, now = run.plan.architecture.config.num_attention_heads, run.config.sequence_parallel
    if run.config.rejected_sampling is not None:
        return []
    fitting = range(now + 1, gpus + 1)
    return [n for n in fitting if not (gpus % n or heads % n or run.sequence_len % n)]


def report(run: RunPlan, gpus: int, memory: float | None) -> str:
    """The table, and what to change if it does not fit."""
    rows = [
        (
            "stage layers parameters trained  weights gradients optimizer activations logits+masks"
            "   peak  work"
        ).split()
    ]
    total = sum(stage.work for stage in run.stages)
    for number, stage in enumerate(run.stages):
        held = stage.memory
        sizes = (
            held.weights,
            held.gradients,
            held.optimizer,
            held.activations,
            held.logits + held.masks,
            held.peak,
        )
        rows.append(
            [
                str(number),
                ", ".join(map(str, stage.layers)),
                f"{stage.weights / 1e6:,.1f}M",
                f"{stage.trained / 1e6:,.1f}M",
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{stage.work / total:.1%}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    config = run.config
    lines += [
        "",
        f"GiB; micro-batches of {config.micro_batch_size} x {run.sequence_len} tokens, "
        f"{config.gradient_accumulation_steps} a step, {run.layout}.",
        f"Bubble {run.bubble:.1%}, balance {run.balance:.1%}, "
        f"expected efficiency {run.efficiency:.1%} of as many GPUs without a pipeline.",
    ]
    return "\n".join(lines + (verdict(run, gpus, memory) if memory else []))


def verdict(run: RunPlan, gpus: int, memory: float) -> list[str]:
    """Say whether the run fits, and if not, the settings with which it would."""
    limit = f"{memory / GIB:.1f} GiB"
    if run.peak <= memory:
        return [f"Fits: the fullest stage takes {run.peak / GIB:.2f} of {limit}."]
    lines = [f"Does not fit: the fullest stage takes {run.peak / GIB:.2f} of {limit}."]
    for number, (change, tried) in enumerate(remedies(run, gpus, memory)):
        if number == SHOWN_REMEDIES:
            break
        settings = ", ".join(f"{key} = {toml(value)}" for key, value in change.items())
        lines.append(f"  {settings}: {tried.peak / GIB:.2f} GiB, efficiency {tried.efficiency:.1%}")
    if len(lines) == 1:
        lines.append("  No change of the pipeline makes it fit: use more GPUs, or train less.")
    return lines


def toml(value: object) -> str:
    """A setting as a config has it."""
    if isinstance(value, QuantizationConfig):
        return '{ backend = "bnb", double_quantization = true }'
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
