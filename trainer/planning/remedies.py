"""Changes of a config with which a run fits the memory of its GPUs."""

from collections.abc import Iterator
from itertools import combinations
from operator import attrgetter
from typing import Any

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.planning.changes import with_changes
from headrace.trainer.planning.planned_run import RunPlan
from headrace.trainer.planning.proposals import goes_together, parts_of_weights
from headrace.trainer.planning.run_plan import plan_run

SMALLEST = QuantizationConfig(backend="bnb", double_quantization=True)


def remedies(run: RunPlan, gpus: int, memory: float) -> Iterator[tuple[dict[str, Any], RunPlan]]:
    """Changes of the config with which the run fits, the mildest first."""
    config = run.config
    layers = run.plan.architecture.layers
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
    single += [{"tensor_parallel": ranks} for ranks in parts_of_weights(run, gpus)]
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
    counted = {(False, config.places, config.tensor_parallel): run.activations}
    for count in range(1, 4):
        for changes in combinations(new, count):
            change = {key: value for part in changes for key, value in part.items()}
            if len(change) < sum(map(len, changes)):
                continue  # two numbers of stages
            changed, quantized = with_changes(config, change), "quantization" in change
            if gpus % changed.replica_ranks:
                continue
            plan = quantized_plan if quantized and quantized_plan else run.plan
            key = (quantized, changed.places, changed.tensor_parallel)
            if changed.tensor_parallel > 1 and not goes_together(changed, plan):
                continue
            tried = plan_run(changed, plan, gpus, run.sequence_len, counted.get(key))
            counted[key] = tried.activations
            if tried.peak <= memory:
                yield change, tried


def more_slices(run: RunPlan, gpus: int) -> list[int]:
    """Return the numbers of ranks that could share rows, above that of the config."""
    heads, now = run.plan.architecture.config.num_attention_heads, run.config.sequence_parallel
    if run.config.rejected_sampling is not None:
        return []
    fitting = range(now + 1, gpus + 1)
    return [n for n in fitting if not (gpus % n or heads % n or run.sequence_len % n)]
