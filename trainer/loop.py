"""The training loop: feed, step, report, evaluate, save."""

import logging
import math
import time
from functools import partial

import torch

from headrace.schemas.errors import TrainingError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train_config import TrainConfig
from headrace.trainer import gradients
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.evaluation import evaluate
from headrace.trainer.export import export
from headrace.trainer.metrics import console_line
from headrace.trainer.model_builder import BuiltStage
from headrace.trainer.optimizer import learning_rate, set_learning_rate
from headrace.trainer.preflight import Inputs
from headrace.trainer.session import Session, open_session
from headrace.trainer.step_report import StepFacts, make_report, step_metrics
from headrace.trainer.stop_signal import StopSignal
from headrace.trainer.timeline import TimelineLog, traced

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig, inputs: Inputs, layout: Layout, stop: StopSignal, resume: bool
) -> None:
    """Train to the end, or until a stop is asked for; every rank runs this.

    Raises:
        TrainingError: the gradient is not finite.
    """
    session = open_session(config, inputs, layout, resume)
    engine, optimizer, state, log = session.engine, session.optimizer, session.state, session.log
    finish = partial(
        finish_step, session.built, optimizer, layout, config.optimizer.gradient_clipping
    )
    if session.is_new and config.evaluation.before_first_step:
        run_evaluation(session, layout, state.step)
    timelines = None
    if config.profile.timeline:
        timelines = TimelineLog(session.run_directory, layout.rank)
    last_save = time.monotonic()
    while state.step < inputs.total_steps and not stop.agreed:
        started = time.perf_counter()
        engine.timeline.begin()
        with engine.timeline.span("data"):
            step_inputs = session.feed.next()
        lr = learning_rate(config.optimizer, config.scheduler, state.step, inputs.total_steps)
        set_learning_rate(optimizer, lr)
        dropout_seed = derive_seed(config.seed, "dropout", state.step)
        with traced(
            session.run_directory, layout.rank, state.step + 1 == config.profile.trace_step
        ):
            losses, norm = engine.train_step(step_inputs, dropout_seed, finish)

        due = time.monotonic() - last_save >= 60 * (config.checkpoint.every_minutes or math.inf)
        report = make_report(losses, step_inputs, stop=stop.requested, save=due)
        reports = gather_objects(report, layout.world_group)
        stop.agreed = any(report.stop for report in reports)
        seconds = time.perf_counter() - started
        first_row = state.next_row
        state = state.after_step(
            inputs.global_batch_rows, inputs.stop_row, step_inputs.tokens, seconds
        )
        if timelines is not None:
            timelines.write(state.step, seconds, engine.timeline.take())
        if log is not None:
            facts = StepFacts(
                state.step, first_row, inputs.rows_per_epoch, state.next_row, lr, norm, seconds
            )
            metrics = step_metrics(reports, step_inputs, facts)
            log.write(metrics)
            start = session.state
            pace = (state.seconds - start.seconds) / (state.step - start.step)
            left = (inputs.total_steps - state.step) * pace
            logger.info("%s", console_line(metrics, inputs.total_steps, left))

        last = state.step == inputs.total_steps
        every = config.evaluation.every_steps
        if (last and config.evaluation.after_last_step) or (every and state.step % every == 0):
            run_evaluation(session, layout, state.step)
        every = config.checkpoint.every_steps
        wished = stop.agreed or any(report.save for report in reports)
        finished = last and config.checkpoint.at_end
        if finished or wished or (every and state.step % every == 0):
            if log is not None:
                log.sync()
            path = session.folder.save(state, session.built.trained, optimizer, layout)
            last_save = time.monotonic()
            logger.info("saved %s", path)

    if state.step < inputs.total_steps:
        logger.info("stopped on request after step %d; continue with --resume", state.step)
    elif config.checkpoint.at_end:
        path = export(session.built, layout, session.model, session.run_directory)
        logger.info("done: %s tokens; %s written", f"{state.tokens:,}", path)
    if log is not None:
        log.close()


def finish_step(
    built: BuiltStage,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    largest_norm: float,
) -> float:
    """Reduce, measure and clip the gradients, then step. Returns the norm before clipping."""
    parameters = [item.parameter for item in built.trained]
    gradients.sum_tied(built, layout)
    gradients.sum_over_replicas(parameters, layout)
    norm = gradients.global_norm(built, layout)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient's norm is {norm}; nothing was updated. "
            "Resume with a lower optimizer.lr, or look at the rows of this step"
        )
    gradients.clip(parameters, norm, largest_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def run_evaluation(session: Session, layout: Layout, step: int) -> None:
    """Evaluate and write the results down."""
    for result in evaluate(session.evaluation_sets, session.engine, layout, step):
        if session.log is not None:
            session.log.write(result)
        logger.info(
            "evaluation %s after step %d: loss %.4f over %s tokens in %.1f s",
            result.name,
            step,
            result.loss,
            f"{result.trained_tokens:,}",
            result.seconds,
        )
