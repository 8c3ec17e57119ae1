"""The optimiser of a stage's trained parameters; the learning rate as a function of the step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.adamw_kahan import AdamWStep, adamw_kahan_reference
from headrace.schemas.train_config import OptimizerConfig, SchedulerConfig
from headrace.trainer.model_builder import TrainedParameter


def build_optimizer(
    config: OptimizerConfig, trained: Sequence[TrainedParameter], *, triton: bool
) -> torch.optim.Optimizer:
    """AdamW; norms and biases (one-dimensional parameters) are not decayed."""
    matrices = [p.parameter for p in trained if p.parameter.ndim > 1]
    vectors = [p.parameter for p in trained if p.parameter.ndim <= 1]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    if config.type == "adamw_kahan":
        return AdamWKahan(groups, config, triton=triton)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


class AdamWKahan(torch.optim.Optimizer):
    """AdamW with states in the weights' own type, and what rounding took from them.

    Args:
        triton: one kernel a tensor instead of its plain twin.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], config: OptimizerConfig, *, triton: bool
    ) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config
        self.update = adamw_kahan_reference
        if triton:
            from headrace.kernels.adamw_kahan_pass import adamw_kahan_pass

            self.update = adamw_kahan_pass

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight] or self._fresh_state(weight)
                state["step"] = state["step"].cpu() + 1  # where it is read without waiting
                step = AdamWStep(
                    group["lr"],
                    self.config.beta1,
                    self.config.beta2,
                    self.config.eps,
                    group["weight_decay"],
                    int(state["step"]),
                )
                moments = (state["exp_avg"], state["exp_avg_sq"], state["compensation"])
                self.update(weight, weight.grad, *moments, step)

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        self.state[weight] = {
            "step": torch.zeros(()),
            **{
                name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq", "compensation")
            },
        }
        return self.state[weight]


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser keeps for each weight, and checkpoints hold."""
    compensation = ("compensation",) if isinstance(optimizer, AdamWKahan) else ()
    return ("exp_avg", "exp_avg_sq", *compensation, "step")


def learning_rate(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, step: int, total_steps: int
) -> float:
    """The rate of a step, from 0: linear warmup, then constant or half a cosine to `min_lr`."""
    if step < scheduler.warmup_steps:
        return optimizer.lr * (step + 1) / scheduler.warmup_steps
    if scheduler.type == "constant":
        return optimizer.lr
    done = (step - scheduler.warmup_steps) / max(1, total_steps - scheduler.warmup_steps)
    return scheduler.min_lr + (optimizer.lr - scheduler.min_lr) * 0.5 * (
        1 + math.cos(math.pi * done)
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
