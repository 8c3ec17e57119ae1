"""The optimizer of a stage's trained parameters."""

import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.schemas.train.optimizers import OPTIMIZERS, OptimizerRecord
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.optim.parameter_groups import Stepped, parameter_groups


class OptimizerAround(torch.optim.Optimizer):
    """An optimizer that holds the states of another one in its own way.

    Attributes:
        inner: an optimizer with a record.
    """

    inner: torch.optim.Optimizer

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the states of a weight, as `headrace.trainer.optim.states` does."""
        raise NotImplementedError

    def restore(self, parameter: nn.Parameter, read: Callable[[str, torch.Size], Tensor]) -> None:
        """Give a weight the states that `read` finds by their names and shapes."""
        raise NotImplementedError


def build_optimizer(
    config: OptimizerConfig,
    trained: Sequence[TrainedParameter],
    *,
    triton: bool = False,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer of a config; norms and biases (one-dimensional parameters) are not decayed.

    With LoRA+ (https://arxiv.org/abs/2402.12354) the adapters' B has a higher rate than all else.

    Args:
        triton: AdamW-Kahan as one kernel a tensor, instead of its plain twin.
        tables: names of embeddings and head, whose matrices are not hidden ones.
    """
    stepped = [Stepped(item, item.parameter) for item in trained]
    return optimizer_of(config, stepped, triton=triton, tables=tables)


def optimizer_of(
    config: OptimizerConfig,
    stepped: Sequence[Stepped],
    *,
    triton: bool = False,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of a config for weights or parts of them, as `build_optimizer`."""
    return make_optimizer(config, parameter_groups(config, stepped, tables), triton)


def make_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], triton: bool
) -> torch.optim.Optimizer:
    """The optimizer that the config names, of torch or the library it is from.

    Raises:
        ConfigError: it needs a GPU, and weights are on a CPU.
    """
    record = config.record
    on_cpu = any(p.device.type == "cpu" for group in groups for p in group["params"])
    if record.cpu_substitute and on_cpu:
        raise ConfigError(
            f'optimizer.type = "{config.type}" needs a GPU; set "{record.cpu_substitute}"'
        )
    given = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "momentum": config.used_momentum,
        "triton": triton,
    }
    arguments = {name: given[name] for name in record.arguments}
    module, _, name = record.factory.partition(":")
    factory = getattr(importlib.import_module(module), name)
    optimizer: torch.optim.Optimizer = factory(groups, **arguments, **record.constants)
    if record.averages:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def record_of(optimizer: torch.optim.Optimizer) -> OptimizerRecord:
    """Return the record of an optimizer, whose class is loaded already.

    Raises:
        TypeError: there is none, so nobody knows its states.
    """
    if isinstance(optimizer, OptimizerAround):
        return record_of(optimizer.inner)
    for record in OPTIMIZERS.values():
        module, _, name = record.factory.partition(":")
        if module in sys.modules and type(optimizer) is getattr(sys.modules[module], name):
            return record
    raise TypeError(
        f"{type(optimizer).__qualname__}: no record in headrace.schemas.train.optimizers"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
