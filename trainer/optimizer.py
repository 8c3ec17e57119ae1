"""The optimiser of a stage's trained parameters; the learning rate as a function of the step."""

import math
from collections.abc import Sequence

import torch

from headrace.schemas.train_config import OptimizerConfig, SchedulerConfig
from headrace.trainer.materializer import TrainedParameter


def build_optimizer(
    config: OptimizerConfig, trained: Sequence[TrainedParameter]
) -> torch.optim.Optimizer:
    """AdamW; norms and biases (one-dimensional parameters) are not decayed."""
    matrices = [p.parameter for p in trained if p.parameter.ndim > 1]
    vectors = [p.parameter for p in trained if p.parameter.ndim <= 1]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


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
