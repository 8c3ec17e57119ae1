"""Parts of a step: its learning rate, and the decay and limits of adapters that follow it."""

from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.optimizer_config import RegularizationConfig
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.optim import relora
from headrace.trainer.optim.learning_rate import learning_rate
from headrace.trainer.optim.regularizers import ProductNorms, find_pairs, regularize


def hold_back(config: RegularizationConfig, built: BuiltStage, rate: float) -> ProductNorms | None:
    """Apply the decay and limits of adapters that follow a step.

    Args:
        rate: the learning rate of the step.
    """
    built.method.after_step(built.names, rate)
    if not config.limits_products:
        return None
    return regularize(config, find_pairs(built.names), rate)


def step_rate(config: ModelConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, from 0."""
    rate = learning_rate(config.optimizer, config.scheduler, step, total_steps)
    return rate * relora.rate_factor(config.relora, step)
