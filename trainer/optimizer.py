"""The optimiser of a stage's trained parameters."""

from collections.abc import Sequence

import torch

from headrace.schemas.train_config import OptimizerConfig
from headrace.trainer.adamw_kahan import AdamWKahan
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


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser keeps for each weight, and checkpoints hold."""
    compensation = ("compensation",) if isinstance(optimizer, AdamWKahan) else ()
    return ("exp_avg", "exp_avg_sq", *compensation, "step")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
