"""Parts of a step: its learning rate, and the decay and limits of adapters that follow it."""

from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.optimizer_config import RegularizationConfig
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.optim import relora
from headrace.trainer.optim.learning_rate import learning_rate
from headrace.trainer.optim.regularizers import ProductNorms, find_pairs, measure, regularize


def hold_back(
    config: RegularizationConfig, built: BuiltStage, rate: float, *, measures: bool = False
) -> ProductNorms | None:
    """Apply the decay and limits of adapters that follow a step.

    Args:
        rate: the learning rate of the step.
        measures: return the norms even if nothing is limited.
    """
    built.method.after_step(built.names, rate)
    limits = config.limits_products
    if not limits and not (measures and has_whole_products(built)):
        return None
    pairs = find_pairs(built.names)
    limited = regularize(config, pairs, rate) if limits else None
    return measure(pairs) if limited is None and measures else limited


def has_whole_products(built: BuiltStage) -> bool:
    """Return whether adapters are pairs of matrices, each whole at this rank."""
    config = built.method.config
    return config.record.has_products and not config.target_parameters and not built.cuts.cuts


def step_rate(config: ModelConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, from 0."""
    rate = learning_rate(config.optimizer, config.scheduler, step, total_steps)
    return rate * relora.rate_factor(config.relora, step)
