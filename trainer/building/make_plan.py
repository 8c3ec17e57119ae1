"""Lays out a whole model without memory, adapters included."""

from dataclasses import replace

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.registry import method_of
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.read_architecture import architecture_of, lay_out
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.model_size import measure
from headrace.trainer.families.score import SCORE
from headrace.trainer.layers.experts import install_experts
from headrace.trainer.objectives.registry import objective_of
from headrace.trainer.objectives.scored_model import with_score
from headrace.trainer.quantized.selection import install_holders, plan_quantization
from headrace.trainer.vision.trained import freeze_vision, with_projector


def make_plan(config: ModelConfig, base: Architecture) -> Plan:
    """Lay the whole model out without memory, adapters included.

    Args:
        base: of the model that the config names.

    Raises:
        ConfigError: an architecture that is not supported, adapters that match nothing.
    """
    directory, kind = model_directory(config.model, config.weights), method_of(config.adapter)
    if not (kind.beside_hidden or base.stream.is_plain):
        raise ConfigError(
            f'adapter.kind = "{config.adapter.kind}" does not go with model_type '
            f'"{base.config.model_type}", whose layers hand on more than hidden states; '
            'use "lora"'
        )
    adapter = config.adapter
    if config.objective.record.scores:
        base, adapter = with_score(base, str(directory)), adapter.training_too(SCORE)
    architecture, reshaped = base, kind.reshape(adapter, base.config)
    if reshaped is not base.config:
        architecture = architecture_of(reshaped, str(directory))
        architecture = replace(architecture, overrides=base.overrides, growth=base.growth)
    plain = lay_out(architecture)
    quantization = plan_quantization(config, directory, plain)
    adapter = with_projector(adapter, config.vision, architecture.vision, plain)
    method = kind(adapter, architecture, plain, config.model, config.seed)
    model = install_experts(lay_out(architecture))
    install_holders(model, quantization, architecture)
    model = method.install(model)
    if config.vision is not None and architecture.vision is not None and method.trains_base:
        freeze_vision(model, config.vision, architecture.vision)
    size = measure(model, architecture, method.prefix)
    objective = objective_of(config.objective)
    return Plan(architecture, plain, model, method, method.prefix, quantization, objective, size)
