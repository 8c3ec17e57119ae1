"""A whole model without memory, with what will be trained in it: what stages are cut from."""

from dataclasses import dataclass

from torch import nn

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.adapters.registry import method_of
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.read_architecture import lay_out
from headrace.trainer.building.model_size import ModelSize, measure
from headrace.trainer.layers.experts import install_experts
from headrace.trainer.quantized.selection import (
    Quantization,
    install_holders,
    plan_quantization,
)


@dataclass(frozen=True)
class Plan:
    """A whole model on the meta device, and how it is run and trained."""

    architecture: Architecture
    plain: nn.Module  # without adapters, to know what names mean
    model: nn.Module  # with adapters
    method: TuningMethod
    prefix: str  # before the model's own names
    quantization: Quantization | None
    size: ModelSize  # taken before any stage is filled, which leaves quantized weights out


def make_plan(config: TrainConfig, base: Architecture) -> Plan:
    """Lay the whole model out without memory, adapters included.

    Args:
        base: of the model that the config names.

    Raises:
        ConfigError: as `build_stage`.
    """
    directory, kind = model_directory(config.model), method_of(config.adapter)
    architecture = kind.reshape(config.adapter, base, str(directory))
    plain = lay_out(architecture)
    quantization = plan_quantization(config, architecture, directory, plain)
    method = kind(config.adapter, architecture, plain, config.model, config.seed)
    model = install_experts(lay_out(architecture))
    install_holders(model, quantization, architecture)
    model = method.install(model)
    size = measure(model, architecture, method.prefix)
    return Plan(architecture, plain, model, method, method.prefix, quantization, size)
