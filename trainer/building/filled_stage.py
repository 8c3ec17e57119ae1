"""One stage of a plan with its weights: laid out, then filled from files or at random."""

from pathlib import Path

import torch

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer import devices
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.weight_index import weights_fingerprint
from headrace.trainer.building.assembly import assemble
from headrace.trainer.building.directory_weights import StoredWeights
from headrace.trainer.building.held_values import HeldTypes, lay_out_with_buffers
from headrace.trainer.building.materializer import Filled, Materializer
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.partition import StageCut
from headrace.trainer.building.weight_source import (
    RandomWeights,
    ScoredWeights,
    WeightSource,
    grown,
)
from headrace.trainer.quantized.cache import QuantizedCache
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard


def fill_stage(
    config: ModelConfig,
    plan: Plan,
    cut: StageCut,
    device: torch.device,
    sequence: SequenceSlice = WHOLE,
    shard: TensorShard = WHOLE_WEIGHTS,
) -> tuple[StageSpec, Filled]:
    """Assemble a stage and give every weight and buffer of it memory and value.

    Raises:
        DataError: weights missing or of another shape than config.json says.
    """
    dtype = devices.compute_dtype(config.dtype, device)
    initial = lay_out_with_buffers(plan.architecture, dtype)
    assembled = assemble(plan, config, cut, dtype, device, initial, sequence=sequence, shard=shard)
    types = HeldTypes(initial, dtype)
    with weight_source(config, plan, types, device, tells=cut.is_first) as source:
        materializer = Materializer(
            config,
            plan.architecture,
            source,
            types,
            device,
            plan.method,
            plan.quantization,
            open_cache(config, plan, dtype, device, shard),
        )
        return assembled, materializer.fill(assembled)


def weight_source(
    config: ModelConfig, plan: Plan, types: HeldTypes, device: torch.device, *, tells: bool
) -> WeightSource:
    """Return what the config names: the model's files, or random initialization.

    Args:
        tells: of what in the files is not used.
    """
    if config.weights == "random":
        return RandomWeights(plan.plain, config.seed, device)
    kept = plan.quantization.stored if plan.quantization else None
    directory = model_directory(config.model, config.weights)
    stored = StoredWeights(directory, plan.plain, types.of, device, kept or frozenset())
    if tells:
        stored.tell_unexpected()
    source = grown(stored, plan.architecture)
    if not plan.architecture.scored:
        return source
    return ScoredWeights(source, plan.architecture.config, config.seed)


def open_cache(
    config: ModelConfig,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    shard: TensorShard,
) -> QuantizedCache | None:
    """Open the cache of quantized layers, if any: one folder for all that decides their bits."""
    settings, quantization = config.quantization, plan.quantization
    if settings is None or settings.cache is None or quantization is None:
        return None
    weights = f"random {config.seed}"
    if config.weights != "random":
        weights = weights_fingerprint(model_directory(config.model, config.weights))
    if not shard.is_whole:
        weights += f", part {shard.rank} of {shard.ranks}"
    computed = str(quantization.compute_dtype(dtype))
    return QuantizedCache(Path(settings.cache), weights, settings, computed, device.type)
