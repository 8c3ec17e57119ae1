"""Lays out a whole model without memory, adapters included."""

from dataclasses import replace

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.registry import method_of
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.read_architecture import architecture_of, lay_out
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import measure
from headrace.trainer.layers.experts import install_experts
from headrace.trainer.objectives.registry import objective_of
from headrace.trainer.quantized.selection import install_holders, plan_quantization


def make_plan(config: ModelConfig, base: Architecture) -> Plan:
    """Lay the whole model out without memory, adapters included.

    Args:
        base: of the model that the config names.

    Raises:
        ConfigError: an architecture that is not supported, adapters that match nothing.
    """
    directory, kind = model_directory(config.model, config.weights), method_of(config.adapter)
    architecture, reshaped = base, kind.reshape(config.adapter, base.config)
    if reshaped is not base.config:
        architecture = architecture_of(reshaped, str(directory))
        architecture = replace(architecture, overrides=base.overrides, growth=base.growth)
    plain = lay_out(architecture)
    quantization = plan_quantization(config, directory, plain)
    method = kind(config.adapter, architecture, plain, config.model, config.seed)
    model = install_experts(lay_out(architecture))
    install_holders(model, quantization, architecture)
    model = method.install(model)
    size = measure(model, architecture, method.prefix)
    objective = objective_of(config.objective)
    return Plan(architecture, plain, model, method, method.prefix, quantization, objective, size)
