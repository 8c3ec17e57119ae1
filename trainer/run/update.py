"""The end of a step: gradients of all stages and replicas, the optimizer, and what follows it."""

from dataclasses import replace

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.run_state import RunState
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.model.control_adapter import control_adapters
from headrace.trainer.model.control_adapter import regularize as regularize_control
from headrace.trainer.model.model_builder import BuiltStage
from headrace.trainer.run import gradients, relora
from headrace.trainer.run.anomalies import NOTHING_TRAINED, judge
from headrace.trainer.run.learning_rate import learning_rate
from headrace.trainer.run.metrics import mean_loss
from headrace.trainer.run.outcome import Outcome
from headrace.trainer.run.regularizers import ProductNorms, find_pairs, regularize
from headrace.trainer.run.session import Session


def finish_step(
    config: TrainConfig, session: Session, layout: Layout, state: RunState, trained_tokens: int
) -> Outcome:
    """Reduce, measure and clip the gradients, then step, unless something is wrong.

    Args:
        trained_tokens: of the whole global batch.
    """
    built, optimizer = session.built, session.optimizer
    parameters = [item.parameter for item in built.trained]
    gradients.sum_tied(built, layout)
    gradients.sum_over_replicas(parameters, layout)
    norm = gradients.global_norm(built, layout)
    loss = None
    if config.anomalies.spike_factor is not None:
        rows = gather_objects(session.engine.row_losses(), layout.world_group)
        loss = mean_loss(row for part in rows for row in part)
    anomaly = judge(config.anomalies, norm, loss, state.recent_losses)
    if not trained_tokens:
        anomaly = NOTHING_TRAINED
    outcome = Outcome(norm, anomaly)
    if outcome.is_taken:
        gradients.clip(parameters, norm, config.optimizer.gradient_clipping)
        optimizer.step()
        norms = hold_back(config, built, step_rate(config, state.step, session.total_steps))
        outcome = replace(outcome, norms=norms)
    if relora.is_due(config.relora, state.step + 1, session.total_steps):
        seed = derive_seed(config.seed, "relora", state.step + 1)
        relora.restart(built, optimizer, config.relora, seed)
    optimizer.zero_grad()
    return outcome


def hold_back(config: TrainConfig, built: BuiltStage, rate: float) -> ProductNorms | None:
    """Apply the decay and limits of adapters that follow a step.

    Args:
        rate: the learning rate of the step.
    """
    for _, adapter in control_adapters(built.names):
        regularize_control(adapter, config.adapter.gamma, rate * config.adapter.control_decay)
    if not config.regularization.limits_products:
        return None
    return regularize(config.regularization, find_pairs(built.names), rate)


def step_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, from 0."""
    rate = learning_rate(config.optimizer, config.scheduler, step, total_steps)
    return rate * relora.rate_factor(config.relora, step)
