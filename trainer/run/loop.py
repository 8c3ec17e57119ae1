"""The training loop: feed, step, report, evaluate, save."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.run_state import RunState
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.data.inputs import Inputs
from headrace.trainer.data.quarantine import describe, merge, write_quarantine
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.export.export import export
from headrace.trainer.model.control_adapter import control_adapters
from headrace.trainer.model.control_adapter import regularize as regularize_control
from headrace.trainer.model.model_builder import BuiltStage
from headrace.trainer.run import gradients, relora
from headrace.trainer.run.anomalies import Outcome, deal_with, judge
from headrace.trainer.run.cadence import Cadence, Stopwatch, Timer, is_multiple
from headrace.trainer.run.evaluation import evaluate
from headrace.trainer.run.interval import DoneStep, Interval
from headrace.trainer.run.learning_rate import learning_rate
from headrace.trainer.run.metrics import console_line, mean_loss
from headrace.trainer.run.optimizer import set_learning_rate
from headrace.trainer.run.optimizer_states import averaged
from headrace.trainer.run.regularizers import ProductNorms, find_pairs, regularize
from headrace.trainer.run.requests import Requests
from headrace.trainer.run.saver import Saver
from headrace.trainer.run.session import Session, open_session
from headrace.trainer.run.step_report import Report, StepFacts, make_report
from headrace.trainer.run.timeline import TimelineLog, traced

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig, inputs: Inputs, layout: Layout, requests: Requests, resume: bool
) -> None:
    """Train to the end, or until a stop is asked for; every rank runs this.

    Raises:
        TrainingError: a step went wrong, and the policy is to stop.
        CheckpointError: a checkpoint could not be written.
    """
    session = open_session(config, inputs, layout, resume)
    engine, optimizer, state, log = session.engine, session.optimizer, session.state, session.log
    cadence = Cadence(config, session.total_steps, inputs.rows_per_epoch)
    saver = Saver(
        session.folder,
        layout,
        background=config.checkpoint.background,
        weights_only=config.checkpoint.weights_only,
        node_local=config.checkpoint.node_local,
    )
    if session.is_new and config.evaluation.before_first_step:
        state = run_evaluation(session, layout, state)
    timelines = None
    if config.profile.timeline:
        timelines = TimelineLog(session.run_directory, layout.rank)
    timer, stopwatch = Timer(config.checkpoint.every_minutes), Stopwatch()
    interval = Interval()
    stopping = False
    while not (stopping or cadence.has_ended(state)):
        engine.timeline.begin()
        waiting = Stopwatch()
        with engine.timeline.span("data"):
            batch, answers = session.feed.read(), None
        data_seconds = waiting.lap()
        if session.rejected_sampling is not None:
            with engine.timeline.span("answers"):
                batch, answers = session.rejected_sampling.replace(batch, state.step)
        with engine.timeline.span("data"):
            step_inputs = session.feed.hand_out(batch)
        lr = step_rate(config, state.step, session.total_steps)
        set_learning_rate(optimizer, lr)
        dropout_seed = derive_seed(config.seed, "dropout", state.step)
        finish = partial(finish_step, config, session, layout, state)
        is_traced = state.step + 1 == config.profile.trace_step
        statistics = is_multiple(state.step + 1, config.reporting.token_statistics_every)
        with traced(session.run_directory, layout.rank, is_traced):
            losses, outcome = engine.train_step(
                step_inputs, dropout_seed, finish, statistics=statistics
            )

        wishes = requests.poll()
        report = make_report(
            losses,
            step_inputs,
            engine.router_loss(),
            wishes.stop,
            wishes.save or timer.is_due(),
            saver.progress(),
            session.feed.take_quarantined(),
            data_seconds,
            outcome.norms if layout.replica == 0 else None,
            engine.token_sample(),
            answers if layout.is_first else None,
        )
        seconds = stopwatch.lap()
        before = state
        state = before.after_step(
            next_row=step_inputs.position.next_row,
            waiting=step_inputs.position.waiting,
            tokens=step_inputs.tokens,
            seconds=seconds,
            overlong_rows=step_inputs.overlong.rows,
            overlong_tokens=step_inputs.overlong.tokens,
        )
        if timelines is not None:
            timelines.write(state.step, seconds, engine.timeline.take())
        facts = StepFacts(
            step=state.step,
            first_row=before.next_row,
            epoch=session.course.epoch_at(state.rows_done),
            room=inputs.room,
            lr=lr,
            gradient_norm=outcome.norm,
            seconds=seconds,
            flops_per_token=session.built.flops_per_token / (layout.stages * layout.replicas),
        )
        interval.add(report, step_inputs, facts)
        if outcome.anomaly is None and not cadence.reports(before, state):
            continue

        done = interval.close(layout)
        reports = [report for step in done for report in step.reports]
        saver.settle([report.written for report in done[-1].reports])
        stopping = any(report.stop for report in reports)
        state = state.after_losses([step.loss for step in done], config.anomalies.losses_kept)
        state = note_quarantined(state, reports, session)
        *earlier, last = done
        write_steps(earlier, session, state)
        if outcome.anomaly is not None:
            deal_with(outcome, state, step_inputs, session.run_directory, layout)
        write_steps([last], session, state)

        if cadence.evaluates(before, state):
            state = run_evaluation(session, layout, state)
            stopwatch.lap()
        wished = stopping or any(report.save for report in reports)
        if wished or cadence.saves(before, state):
            if log is not None:
                log.sync()
            saver.begin(state, session.built.trained, optimizer, session.built.kept)
            timer.restart()
            stopwatch.lap()

    saver.finish()
    if cadence.has_ended(state):
        written = write_result(config, session, layout, state)
        logger.info(
            "done%s: %s tokens; %s written", ending(cadence, state), f"{state.tokens:,}", written
        )
    else:
        logger.info("stopped on request after step %d; continue with --resume", state.step)
    if log is not None:
        log.close()


def write_steps(steps: Sequence[DoneStep], session: Session, state: RunState) -> None:
    """To the files and the console, at the first rank."""
    if session.log is None:
        return
    for step in steps:
        metrics = step.metrics()
        session.log.write(metrics)
        left = seconds_left(session, state)
        logger.info("%s", console_line(metrics, session.total_steps, left))


def seconds_left(session: Session, state: RunState) -> float:
    """Until the last step, at the mean pace of this process."""
    start = session.state
    pace = (state.seconds - start.seconds) / (state.step - start.step)
    return (session.total_steps - state.step) * pace


def write_result(config: TrainConfig, session: Session, layout: Layout, state: RunState) -> str:
    """Export what was trained, if the config wants it; says where it lies."""
    if not config.checkpoint.at_end:
        return "nothing"
    with averaged(session.optimizer, session.built.trained):
        result = export(
            session.built,
            layout,
            session.model,
            session.run_directory,
            state.step,
            node_local=config.checkpoint.node_local,
            save_dtype=config.checkpoint.save_dtype,
        )
    return str(result)


def note_quarantined(state: RunState, reports: Sequence[Report], session: Session) -> RunState:
    """The state with the row groups that any rank has given up; written down by the first rank."""
    found = [record for report in reports for record in report.quarantined]
    records = merge(state.quarantined, found)
    if len(records) == len(state.quarantined):
        return state
    if session.log is not None:
        write_quarantine(session.run_directory, records)
        for record in records:
            if record not in state.quarantined:
                logger.warning("quarantined: %s", describe(record))
    return state.model_copy(update={"quarantined": records})


def finish_step(config: TrainConfig, session: Session, layout: Layout, state: RunState) -> Outcome:
    """Reduce, measure and clip the gradients, then step, unless something is wrong."""
    built, optimizer = session.built, session.optimizer
    parameters = [item.parameter for item in built.trained]
    gradients.sum_tied(built, layout)
    gradients.sum_over_replicas(parameters, layout)
    norm = gradients.global_norm(built, layout)
    loss = None
    if config.anomalies.spike_factor is not None:
        rows = gather_objects(session.engine.row_losses(), layout.world_group)
        loss = mean_loss(row for part in rows for row in part)
    outcome = Outcome(norm, judge(config.anomalies, norm, loss, state.recent_losses))
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
    """What follows a step: decay and limits of adapters.

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


def run_evaluation(session: Session, layout: Layout, state: RunState) -> RunState:
    """Evaluate and write the results down; the state then knows the loss over all sets."""
    with averaged(session.optimizer, session.built.trained):
        results = evaluate(session.evaluation_sets, session.engine, layout, state.step)
    for result in results:
        if session.log is not None:
            session.log.write(result)
        logger.info(
            "evaluation %s after step %d: loss %.4f%s over %s tokens in %.1f s",
            result.name,
            state.step,
            result.loss,
            "" if result.pairs is None else f", accuracy {result.pairs.accuracy:.0%}",
            f"{result.trained_tokens:,}",
            result.seconds,
        )
    weight = sum(result.weight for result in results)
    if not weight:
        return state
    loss = math.fsum(result.loss * result.weight for result in results) / weight
    return state.after_evaluation(loss)


def ending(cadence: Cadence, state: RunState) -> str:
    """What is worth saying about the end of a run."""
    early = f" early, after step {state.step}" if cadence.is_out_of_patience(state) else ""
    if state.best_loss is None:
        return early
    return f"{early}; lowest evaluation loss {state.best_loss:.4f} after step {state.best_step}"
