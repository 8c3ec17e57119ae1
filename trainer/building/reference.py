"""Models that the trained one is compared with: itself before training, or a teacher."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.names import base_name, is_adapter
from headrace.trainer.architecture.read_architecture import lay_out
from headrace.trainer.building.assembly import assemble
from headrace.trainer.building.held_values import lay_out_with_buffers
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.parameter_slots import find_slots, stored_buffers
from headrace.trainer.building.partition import StageCut
from headrace.trainer.quantized.modules import QuantizableModule
from headrace.trainer.stage.spec import StageSpec


def reference_of(
    policy: StageSpec,
    plan: Plan,
    config: ModelConfig,
    cut: StageCut,
    device: torch.device,
) -> StageSpec:
    """A stage of the same layers without adapters, to be run without gradients.

    Under adapters it is made of the very modules that they wrap and takes no memory. Where the
    weights themselves are trained it holds a frozen copy of them, in their own type, so that it
    gives the same to the last bit until the first step.

    Args:
        policy: the stage that will be trained, with its initial weights.
    """
    model: Any = lay_out(plan.architecture)
    if not plan.method.trains_base:
        share_modules(policy, model)
    plain = replace(plan, model=model, prefix="")
    dtype = policy.compute_dtype
    initial = lay_out_with_buffers(plan.architecture, dtype)
    reference = assemble(
        plain, config, cut, dtype, device, initial, trains=False, sequence=policy.sequence
    )
    if plan.method.trains_base:
        copy_weights(policy, reference)
    share_buffers(policy, reference)
    return replace(reference, weight_offload=policy.weight_offload)


def share_modules(policy: StageSpec, model: Any) -> None:
    """Put the modules that adapters wrap, or leave alone, into a model without adapters."""
    for prefix, module in policy.modules.items():
        for name, part in module.named_modules():
            path = f"{prefix}.{name}." if name else f"{prefix}."
            frozen = not is_adapter(path) and ".modules_to_save." not in path
            holds = isinstance(part, QuantizableModule) or any(
                weight is not None for weight in part._parameters.values()
            )
            if not (frozen and holds):
                continue
            place = base_name(path).removesuffix(".")
            own = model.get_submodule(place)
            if any(True for child in own.children() for _ in child.parameters()):
                # a mixer, say, in which adapters wrap other parts, or LLaVA-NeXT's own weight
                own._parameters.update(part._parameters)
            else:
                model.set_submodule(place, part)


def share_buffers(policy: StageSpec, reference: StageSpec) -> None:
    """Give the reference the buffers that the checkpoint holds; nothing trains them."""
    values = {base_name(slot.name): slot.value for slot in stored_buffers(policy.modules)}
    for slot in stored_buffers(reference.modules):
        slot.fill(values[slot.name])


def copy_weights(policy: StageSpec, reference: StageSpec) -> None:
    """Frozen copies of all weights; those that share memory share their copy."""
    copies: dict[int, Tensor] = {}
    weights = policy.canonical_parameters()
    for slot in find_slots(reference.modules):
        weight = weights[slot.name].detach()
        copy = copies.setdefault(weight.data_ptr(), weight.clone())
        slot.fill(nn.Parameter(copy, requires_grad=False))
