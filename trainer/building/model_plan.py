"""A whole model without memory, with what will be trained in it: what stages are cut from."""

from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.control import add_control_adapters
from headrace.trainer.adapters.initial_values import takes_over
from headrace.trainer.adapters.names import PEFT_PREFIX
from headrace.trainer.adapters.targets import (
    adapter_layers,
    add_adapter,
    check_targets,
    lora_config,
    select_trained,
)
from headrace.trainer.architecture.architecture import Architecture, architecture_of, lay_out
from headrace.trainer.architecture.block_expansion import Expansion, expand
from headrace.trainer.architecture.model_directory import model_directory
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
    lora: LoraConfig | None
    expansion: Expansion | None
    quantization: Quantization | None
    size: ModelSize  # taken before any stage is filled, which leaves quantized weights out
    control: AdapterConfig | None = None  # of control adapters
    trains_weights: bool = False  # of the model itself, and no adapters

    @property
    def prefix(self) -> str:
        """Return the prefix that PEFT puts before the model's own names."""
        return PEFT_PREFIX if self.lora is not None else ""


def make_plan(config: TrainConfig, architecture: Architecture) -> Plan:
    """The whole model without memory, adapters included.

    Args:
        architecture: of the model that the config names.

    Raises:
        ConfigError: as `build_stage`.
    """
    directory, expansion = model_directory(config.model), None
    if config.adapter.kind == "blocks":
        larger, expansion = expand(architecture.config, config.adapter.blocks)
        architecture = architecture_of(larger, str(directory))
    plain = lay_out(architecture)
    quantization = plan_quantization(config, architecture, directory, plain)
    layers = architecture.config.num_hidden_layers
    lora = lora_config(config.adapter, plain, config.model, layers)
    model = install_experts(lay_out(architecture))
    install_holders(model, quantization, architecture)
    if lora is not None:
        wrapped = add_adapter(model, lora)
        check_targets(config.adapter, plain, wrapped)
        head = wrapped.get_submodule(PEFT_PREFIX + architecture.family.head)
        if architecture.tied and isinstance(head, LoraLayer) and takes_over(config.adapter):
            raise ConfigError(
                f'adapter.init = "{config.adapter.init}": the head is tied to the embedding, and '
                "nothing can be taken out of one alone; leave it out of target_modules"
            )
        size = measure(wrapped, architecture, PEFT_PREFIX)
        return Plan(architecture, plain, wrapped, lora, None, quantization, size)
    if config.adapter.kind == "control":
        wanted = adapter_layers(config.adapter, layers)
        model.requires_grad_(False)
        width = architecture.config.hidden_size
        add_control_adapters(
            model.get_submodule(architecture.family.layers), wanted, width, config.adapter
        )
        size = measure(model, architecture)
        return Plan(architecture, plain, model, None, None, quantization, size, config.adapter)
    if expansion is not None:
        for name, parameter in model.named_parameters():
            new = expansion.is_new(name, architecture.family.layers)
            parameter.requires_grad_(parameter.requires_grad and new)
    else:
        select_trained(model, config.adapter, architecture.family.layers, layers)
    size = measure(model, architecture)
    return Plan(
        architecture, plain, model, None, expansion, quantization, size, trains_weights=True
    )
