"""Changes of a config with which a run fits the memory of its GPUs."""

from collections.abc import Iterator
from itertools import combinations
from operator import attrgetter
from typing import Any

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.planning.changes import goes_together, parts_of_weights, with_changes
from headrace.trainer.planning.planned_run import RunPlan, TriedModel
from headrace.trainer.planning.run_plan import plan_run

SMALLEST = QuantizationConfig(backend="bnb", double_quantization=True)
MOST_AT_ONCE = 3  # changes


def remedies(
    run: RunPlan, gpus: int, memory: float, tried: TriedModel
) -> Iterator[tuple[dict[str, Any], RunPlan]]:
    """Yield changes of the config with which the run fits, the mildest first.

    Args:
        memory: bytes of one GPU.
        tried: of its model.
    """
    config, single = run.config, single_changes(run, gpus, tried)
    plans = {False: run.plan}
    if {"quantization": SMALLEST} in single:
        plans[True] = tried.quantized(SMALLEST)
    counted = {(False, config.places, config.tensor_parallel): run.activations}
    for change in combined(single):
        changed, quantized = with_changes(config, change), "quantization" in change
        plan = plans[quantized]
        if gpus % changed.replica_ranks:
            continue
        if changed.tensor_parallel > 1 and not goes_together(changed, plan):
            continue
        key = (quantized, changed.places, changed.tensor_parallel)
        fitted = plan_run(changed, plan, gpus, run.sequence_len, counted.get(key))
        counted[key] = fitted.activations
        if fitted.peak <= memory:
            yield change, fitted


def combined(single: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one change after the other, then several together that change different keys."""
    for count in range(1, MOST_AT_ONCE + 1):
        for changes in combinations(single, count):
            change = {key: value for part in changes for key, value in part.items()}
            if len(change) == sum(map(len, changes)):
                yield change


def single_changes(run: RunPlan, gpus: int, tried: TriedModel) -> list[dict[str, Any]]:
    """Return the changes that take memory off a GPU, the mildest first."""
    config = run.config
    found = changes_of_stages(run)
    found += [{"pipeline_stages": stages} for stages in more_stages(run, gpus)]
    found += [{"sequence_parallel": ranks} for ranks in more_slices(run, gpus)]
    found += [{"tensor_parallel": ranks} for ranks in parts_of_weights(run, gpus, tried)]
    if config.quantization is None and config.adapter.record.has_products:
        found.insert(2, {"quantization": SMALLEST})
    if not config.adapter.record.trains_base:
        found.append({"embedding_on_cpu": True})
        if not config.relora.every_steps:
            found.append({"weight_offload": "mlp"})
    return [
        change
        for change in found
        if any(attrgetter(key)(config) != value for key, value in change.items())
    ]


def changes_of_stages(run: RunPlan) -> list[dict[str, Any]]:
    """Return the changes that leave the model with the same ranks."""
    config = run.config
    found: list[dict[str, Any]] = [
        {"partition": "memory"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "full", "activation_offload": True},
    ]
    if config.micro_batch_size > 1:
        rows = config.micro_batch_size * config.gradient_accumulation_steps
        found.append({"micro_batch_size": 1, "gradient_accumulation_steps": rows})
    if config.schedule == "interleaved":
        found.append({"schedule": "1f1b"})
    if config.optimizer.record.shardable and not config.relora.every_steps:
        found.append({"optimizer.shard": True})
    if config.optimizer.record.states is not None:
        found.append({"optimizer.offload": True})
    return found


def more_stages(run: RunPlan, gpus: int) -> list[int]:
    """Return the numbers of stages above that of the config."""
    config, layers = run.config, run.plan.architecture.layers
    chunks = config.parts // config.pipeline_stages
    return [
        stages
        for stages in range(config.pipeline_stages + 1, min(gpus, layers // chunks) + 1)
        if gpus % stages == 0 and (chunks == 1 or config.gradient_accumulation_steps % stages == 0)
    ]


def more_slices(run: RunPlan, gpus: int) -> list[int]:
    """Return the numbers of ranks that could share rows, above that of the config."""
    heads, now = run.plan.architecture.config.num_attention_heads, run.config.sequence_parallel
    if run.config.rejected_sampling is not None:
        return []
    fitting = range(now + 1, gpus + 1)
    return [n for n in fitting if not (gpus % n or heads % n or run.sequence_len % n)]
