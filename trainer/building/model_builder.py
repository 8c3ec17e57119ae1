"""Builds one stage of a Hugging Face model, adapters included, and loads only its own weights."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.history import AdapterHistory
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.architecture.architecture import Architecture, read_architecture
from headrace.trainer.architecture.families import FAMILIES
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.building.checkpoint_files import INITIAL, MERGED, tensor_name
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.model_plan import Plan, make_plan
from headrace.trainer.building.model_size import flops_per_token, partition
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.building.partition import Span, StageCut
from headrace.trainer.building.reference import reference_of
from headrace.trainer.building.self_check import check_against_transformers
from headrace.trainer.building.sequence_check import check_rows_can_be_cut
from headrace.trainer.layers.sequence_attention import share_rows
from headrace.trainer.layers.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.layers.weight_offload import WeightOffload, find_weights
from headrace.trainer.quantized.selection import check_fp8_device
from headrace.trainer.stage.acceleration import accelerate
from headrace.trainer.stage.stage import Stage


@dataclass(frozen=True)
class BuiltStage:
    """The part of the model in one process, with its weights, and the facts training needs."""

    chunks: list[Stage]  # in the order of the model; one, unless the schedule is interleaved
    trained: list[TrainedParameter]
    tied_copy: nn.Parameter | None  # a trained tied embedding, or the last stage's copy of it
    tied_head: nn.Parameter | None  # single stage: the head, over the memory of `tied_copy`
    model_config: Any
    method: TuningMethod
    layers: list[Span]  # of each chunk
    architecture: Architecture
    skeleton: Any  # the whole model without adapters, on the meta device
    history: AdapterHistory = field(default_factory=AdapterHistory)
    flops_per_token: float = 0.0  # of the whole model, forward and backward

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
        """Return what checkpoints hold of adapters beside their values, by their own names."""
        kept = {tensor_name(MERGED, name): value for name, value in self.history.merged.items()}
        for name, value in self.history.initial.items():
            kept[tensor_name(INITIAL, name)] = value
        return kept


def plan_model(config: TrainConfig) -> Plan:
    """Lay out the model that a config names; one whose type has no record is tried out first.

    Raises:
        ConfigError: as `build_stage`.
    """
    directory = model_directory(config.model)
    architecture = read_architecture(directory)
    if architecture.config.model_type not in FAMILIES:
        check_against_transformers(architecture, str(directory))
    if config.sequence_parallel > 1:
        check_rows_can_be_cut(config, architecture)
    plan = make_plan(config, architecture)
    plan.method.check_result()
    return plan


def build_stage(
    config: TrainConfig,
    stage: int,
    device: torch.device,
    plan: Plan | None = None,
    sequence: SequenceSlice = WHOLE,
) -> BuiltStage:
    """Lay the whole model out without memory, keep this stage's modules, and load their weights.

    Args:
        stage: of an interleaved schedule, the part of the model.
        plan: of this config, where several stages are built from one.
        sequence: the slice of every row that the stage is to hold.

    Raises:
        ConfigError: an architecture that is not supported, adapters that match nothing.
        DataError: weights missing or of another shape than config.json says.
    """
    check_fp8_device(config, device)
    plan = plan or plan_model(config)
    cut = StageCut(stage, config.parts, partition(config, plan.size)[stage])
    built, filled = fill_stage(config, plan, cut, device, sequence)
    offload_weights(built, config, device)
    if config.objective.has_reference:
        built.reference = reference_of(built, plan, config, cut, device)
        built.reference.weight_offload = built.weight_offload
        accelerate(built.reference, config, plan.architecture, device)
    accelerate(built, config, plan.architecture, device)
    share_rows(built.modules(), sequence)
    embedding = f"{plan.architecture.family.embedding}.weight"
    tied_name = embedding if plan.architecture.tied else None
    return BuiltStage(
        chunks=[built],
        trained=filled.trained,
        tied_copy=next((p.parameter for p in filled.trained if p.name == tied_name), None),
        tied_head=filled.tied_head,
        model_config=plan.architecture.config,
        method=plan.method,
        layers=[cut.layers],
        architecture=plan.architecture,
        skeleton=plan.plain,
        history=AdapterHistory(filled.initial),
        flops_per_token=flops_per_token(plan.size, plan.method.trains_all),
    )


def offload_weights(stage: Stage, config: TrainConfig, device: torch.device) -> None:
    """Leave the weights that the config names in host memory.

    Raises:
        ConfigError: no layer of the model has such weights.
    """
    wish = config.weight_offload
    if wish == "none":
        return
    layers = list(zip(stage.layer_names, stage.layers, strict=True))
    if not any(find_weights(name, layer, wish) for name, layer in layers):
        raise ConfigError(
            f'weight_offload = "{wish}": the layers of this model have no frozen part of that '
            "name; drop it"
        )
    stage.weight_offload = WeightOffload(layers, wish, device)
