"""The optimizer of a stage's trained parameters."""

from collections.abc import Sequence
from typing import Any

import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.optimizer_config import OptimizerConfig
from headrace.trainer.model.control_adapter import is_control
from headrace.trainer.model.slots import TrainedParameter
from headrace.trainer.run.adamw_kahan import AdamWKahan

LORA_UP = (".lora_B.", ".lora_embedding_B.")


def build_optimizer(
    config: OptimizerConfig, trained: Sequence[TrainedParameter], *, triton: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a config; norms and biases (one-dimensional parameters) are not decayed.

    With LoRA+ (https://arxiv.org/abs/2402.12354) the adapters' B has a higher rate than all else.

    Args:
        triton: AdamW-Kahan as one kernel a tensor, instead of its plain twin.
    """

    def group(decayed: bool, up: bool) -> dict[str, Any]:
        parameters = [
            item.parameter
            for item in trained
            if is_decayed(item) == decayed and is_up(item.name) == up
        ]
        return {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate_factor": config.lora_plus_ratio if up else 1.0,
        }

    groups = [group(decayed, up) for decayed in (True, False) for up in (False, True)]
    groups = [group for group in groups if group["params"]] or groups[:1]  # a stage may train none
    return make_optimizer(config, groups, triton)


def make_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], triton: bool
) -> torch.optim.Optimizer:
    """The optimizer that the config names, of torch or the library it is from.

    Raises:
        ConfigError: paged states on a CPU.
    """
    lr, betas = config.lr, (config.beta1, config.beta2)
    match config.type:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)
        case "adamw_kahan":
            return AdamWKahan(groups, config, triton=triton)
        case "adam":
            undecayed = [group | {"weight_decay": 0.0} for group in groups]
            return torch.optim.Adam(undecayed, lr=lr, betas=betas, eps=config.eps, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=lr)
        case "lion":
            from lion_pytorch import Lion

            return Lion(groups, lr=lr, betas=betas)
        case "adamw_schedule_free":
            from schedulefree import AdamWScheduleFree

            optimizer = AdamWScheduleFree(groups, lr=lr, betas=betas, eps=config.eps)
            optimizer.train()
            return optimizer
        case "adamw_8bit" | "adamw_8bit_paged":
            from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

            paged = config.type == "adamw_8bit_paged"
            if paged and any(p.device.type == "cpu" for group in groups for p in group["params"]):
                raise ConfigError(
                    'optimizer.type = "adamw_8bit_paged" needs a GPU; set "adamw_8bit"'
                )
            kind = PagedAdamW8bit if paged else AdamW8bit
            return kind(groups, lr=lr, betas=betas, eps=config.eps)


def is_decayed(item: TrainedParameter) -> bool:
    """Return whether weight decay applies: to matrices only, without those of control adapters."""
    return item.parameter.ndim > 1 and not is_control(item.name)


def is_up(name: str) -> bool:
    """Return whether a parameter is the B of an adapter."""
    return any(part in f"{name}." for part in LORA_UP)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
