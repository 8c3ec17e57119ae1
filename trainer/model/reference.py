"""Weights of the model as it was before training: what DPO compares with."""

from typing import Any

from torch import Tensor, nn

from headrace.trainer.model.adapters import base_name, is_adapter
from headrace.trainer.model.materializer import find_slots
from headrace.trainer.model.quantized_modules import Holder
from headrace.trainer.model.stage import Stage


def share_modules(policy: Stage, model: Any) -> None:
    """Put the modules that adapters wrap, or leave alone, into a model without adapters."""
    for prefix, module in policy.names.items():
        for name, part in module.named_modules():
            path = f"{prefix}.{name}." if name else f"{prefix}."
            frozen = not is_adapter(path) and ".modules_to_save." not in path
            holds = isinstance(part, Holder) or any(
                weight is not None for weight in part._parameters.values()
            )
            if frozen and holds:
                model.set_submodule(base_name(path).removesuffix("."), part)


def copy_weights(policy: Stage, reference: Stage) -> None:
    """Frozen copies of all weights; those that share memory share their copy."""
    copies: dict[int, Tensor] = {}
    weights = policy.canonical_parameters()
    for slot in find_slots(reference.names):
        weight = weights[slot.name].detach()
        copy = copies.setdefault(weight.data_ptr(), weight.clone())
        slot.fill(nn.Parameter(copy, requires_grad=False))
