"""ReLoRA (https://arxiv.org/abs/2307.05695): adapters are added to the frozen weights now and then,
and start anew, so that what is learned may have any rank.

What was added is kept as the small matrices it was: a checkpoint needs no frozen weight, adding
them again in their order gives the same weights to the bit, and all of them side by side are an
ordinary LoRA of a larger rank.
"""

import math
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.optimizer_config import ReloraConfig
from headrace.trainer.adapters.initial_values import initial_values
from headrace.trainer.adapters.names import lora_layers
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.optim.optimizer import record_of


def rate_factor(config: ReloraConfig, step: int) -> float:
    """Return the factor of a step's learning rate, which rises linearly after each restart."""
    if config.every_steps is None or step < config.every_steps:
        return 1.0
    return min(1.0, (step % config.every_steps + 1) / max(1, config.warmup_steps))


def is_due(config: ReloraConfig, steps_done: int, total_steps: int) -> bool:
    """Return whether a restart follows; none does after the last step."""
    every = config.every_steps
    return every is not None and steps_done % every == 0 and steps_done < total_steps


def check_relora(built: BuiltStage) -> None:
    """Refuse what cannot be restarted.

    Raises:
        ConfigError: naming the key to change.
    """
    for name, _ in lora_layers(built.names):
        ends = (built.architecture.family.embedding, built.architecture.family.head)
        if built.architecture.tied and name.endswith(ends):
            raise ConfigError(
                "relora.every_steps: embedding and head are tied, and nothing can be added to one "
                "alone; leave them out of adapter.target_modules"
            )


@torch.no_grad()
def restart(
    built: BuiltStage, optimizer: torch.optim.Optimizer, config: ReloraConfig, seed: int
) -> None:
    """Add the adapters to their weights, start them anew, and forget most of the moments.

    Args:
        seed: of this restart.
    """
    for name, layer in lora_layers(built.names):
        for parameter, value in adapter_parameters(name, layer).items():
            kept = value.detach().cpu().float().unsqueeze(0).clone()
            before = built.history.merged.get(parameter)
            built.history.merged[parameter] = kept if before is None else torch.cat([before, kept])
        add_to_base(layer)
        for part, value in initial_values(name, layer, "kaiming", seed).items():
            adapter_parameters(name, layer)[f"{name}.{part}"].copy_(value)
    for _, layer in lora_layers(built.names):
        for matrix in adapter_parameters("", layer).values():
            states = optimizer.state.get(matrix, {})
            for moment in record_of(optimizer).prunable:
                if moment in states:
                    prune(states[moment], config.prune)


@torch.no_grad()
def replay(built: BuiltStage, merged: Mapping[str, Tensor]) -> None:
    """Add to freshly loaded weights what the restarts of an earlier process had added.

    Args:
        merged: by parameter, [restarts, ...]; the adapters are left with the last of them.
    """
    for name, layer in lora_layers(built.names):
        parameters = adapter_parameters(name, layer)
        restarts = max((len(merged[key]) for key in parameters if key in merged), default=0)
        for number in range(restarts):
            for key, parameter in parameters.items():
                parameter.copy_(merged[key][number])
            add_to_base(layer)
        built.history.merged.update({key: merged[key] for key in parameters if key in merged})


def add_to_base(layer: LoraLayer) -> None:
    """Put an adapter's product into the weight below it; the sum is formed in float32."""
    weight = layer.get_base_layer().weight
    delta = layer.get_delta_weight("default").float()
    weight.copy_((weight.float() + delta).to(weight.dtype))


def prune(moment: Tensor, share: float) -> None:
    """Set the smallest entries to 0, in place; of equal ones all or none."""
    count = math.floor(share * moment.numel())
    if count:
        sizes = moment.abs().flatten()
        moment.mul_(moment.abs() > torch.kthvalue(sizes, count).values)


def adapter_parameters(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    """An adapter's matrices by their names in the whole model."""
    return {
        f"{name}.{key}": parameter
        for key, parameter in layer.named_parameters()
        if key.startswith("lora_")
    }
