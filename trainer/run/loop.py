"""The training loop: feed, step, report, evaluate, save."""

import logging
from dataclasses import dataclass
from functools import partial

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.run_state import RunState
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.data.feed import StepInputs
from headrace.trainer.data.inputs import Inputs
from headrace.trainer.distributed import Layout
from headrace.trainer.run.anomalies import deal_with
from headrace.trainer.run.cadence import Cadence, Stopwatch, Timer, is_multiple
from headrace.trainer.run.interval import Interval
from headrace.trainer.run.metrics import RowLoss
from headrace.trainer.run.optimizer import set_learning_rate
from headrace.trainer.run.outcome import Outcome
from headrace.trainer.run.records import (
    ending,
    note_quarantined,
    run_evaluation,
    write_result,
    write_steps,
)
from headrace.trainer.run.rejected_sampling import AnswerFacts
from headrace.trainer.run.requests import Requests
from headrace.trainer.run.saver import Saver
from headrace.trainer.run.session import Session, open_session
from headrace.trainer.run.step_report import Report, StepFacts, memory_gib
from headrace.trainer.run.timeline import TimelineLog, traced
from headrace.trainer.run.update import finish_step, step_rate

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
    loop = Loop(config, inputs, layout, requests, session)
    loop.begin()
    while not (loop.stopping or loop.cadence.has_ended(loop.state)):
        loop.step()
    loop.end()


@dataclass(frozen=True)
class TakenStep:
    """Record of a step that this rank has just taken."""

    inputs: StepInputs
    lr: float
    losses: list[RowLoss]
    outcome: Outcome
    answers: AnswerFacts | None  # that replaced the batch's rejected ones
    data_seconds: float


class Loop:
    """One rank's way from the state that a run begins with to its end, step by step."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        layout: Layout,
        requests: Requests,
        session: Session,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.layout = layout
        self.requests = requests
        self.session = session
        self.state = session.state
        self.stopping = False
        self.cadence = Cadence(config, session.total_steps, inputs.rows_per_epoch)
        self.saver = Saver(
            session.folder,
            layout,
            background=config.checkpoint.background,
            weights_only=config.checkpoint.weights_only,
            node_local=config.checkpoint.node_local,
        )
        self.timelines = None
        if config.profile.timeline:
            self.timelines = TimelineLog(session.run_directory, layout.rank)
        self.timer, self.stopwatch = Timer(config.checkpoint.every_minutes), Stopwatch()
        self.interval = Interval()

    def begin(self) -> None:
        """Evaluate before the first step of a new run, where that is wanted."""
        if self.session.is_new and self.config.evaluation.before_first_step:
            self.state = run_evaluation(self.session, self.layout, self.state)
            self.timer.restart()
            self.stopwatch.lap()

    def step(self) -> None:
        """Take a step; where it is due, report, evaluate and save."""
        before, taken = self.state, self.take_step()
        report = self.report_of(taken)
        seconds = self.stopwatch.lap()
        self.state = before.after_step(
            next_row=taken.inputs.position.next_row,
            waiting=taken.inputs.position.waiting,
            tokens=taken.inputs.tokens,
            seconds=seconds,
            overlong_rows=taken.inputs.overlong.rows,
            overlong_tokens=taken.inputs.overlong.tokens,
        )
        if self.timelines is not None:
            self.timelines.write(self.state.step, seconds, self.session.engine.timeline.take())
        self.interval.add(report, taken.inputs, self.facts_of(taken, before, seconds))
        if taken.outcome.anomaly is None and not self.cadence.reports(before, self.state):
            return
        wished = self.report(taken)
        if self.cadence.evaluates(before, self.state):
            self.state = run_evaluation(self.session, self.layout, self.state)
            self.stopwatch.lap()
        if wished or self.cadence.saves(before, self.state):
            self.save()

    def take_step(self) -> TakenStep:
        """Read a global batch, hand it out, and train on it."""
        config, session, step = self.config, self.session, self.state.step
        engine = session.engine
        engine.timeline.begin()
        waiting = Stopwatch()
        with engine.timeline.span("data"):
            batch, answers = session.feed.read(), None
        data_seconds = waiting.lap()
        if session.rejected_sampling is not None:
            with engine.timeline.span("answers"):
                batch, answers = session.rejected_sampling.replace(batch, step)
        with engine.timeline.span("data"):
            inputs = session.feed.hand_out(batch)
        lr = step_rate(config, step, session.total_steps)
        set_learning_rate(session.optimizer, lr)
        is_traced = step + 1 == config.profile.trace_step
        with traced(session.run_directory, self.layout.rank, is_traced):
            losses, outcome = engine.train_step(
                inputs,
                derive_seed(config.seed, "dropout", step),
                partial(
                    finish_step, config, session, self.layout, self.state, inputs.trained_tokens
                ),
                statistics=is_multiple(step + 1, config.reporting.token_statistics_every),
            )
        return TakenStep(inputs, lr, losses, outcome, answers, data_seconds)

    def report_of(self, taken: TakenStep) -> Report:
        """Return this rank's report to the others."""
        wishes, engine = self.requests.poll(), self.session.engine
        return Report(
            losses=taken.losses,
            rows=taken.inputs.leader_rows,
            router_loss=engine.router_loss(),
            memory_gib=memory_gib(),
            stop=wishes.stop,
            save=wishes.save or self.timer.is_due(),
            written=self.saver.progress(),
            quarantined=self.session.feed.take_quarantined(),
            data_seconds=taken.data_seconds,
            norms=taken.outcome.norms if self.layout.replica == 0 else None,
            tokens=engine.token_sample(),
            answers=taken.answers if self.layout.is_first else None,
        )

    def facts_of(self, taken: TakenStep, before: RunState, seconds: float) -> StepFacts:
        """Return the facts of a step that every rank knows by itself."""
        processes = self.layout.stages * self.layout.replicas
        return StepFacts(
            step=self.state.step,
            first_row=before.next_row,
            epoch=self.session.course.epoch_at(self.state.rows_done),
            room=self.inputs.room,
            lr=taken.lr,
            gradient_norm=taken.outcome.norm,
            seconds=seconds,
            flops_per_token=self.session.built.flops_per_token / processes,
        )

    def report(self, last: TakenStep) -> bool:
        """Exchange and write down all steps not reported yet; whether anyone wishes a save."""
        done = self.interval.close(self.layout)
        reports = [report for step in done for report in step.reports]
        self.saver.settle([report.written for report in done[-1].reports])
        self.stopping = any(report.stop for report in reports)
        kept = self.config.anomalies.losses_kept
        self.state = self.state.after_losses([step.loss for step in done], kept)
        self.state = note_quarantined(self.state, reports, self.session)
        write_steps(done[:-1], self.session, self.state)
        if last.outcome.anomaly is not None:
            directory = self.session.run_directory
            deal_with(last.outcome, self.state, last.inputs, directory, self.layout)
        write_steps(done[-1:], self.session, self.state)
        return self.stopping or any(report.save for report in reports)

    def save(self) -> None:
        """Begin a checkpoint of this moment; metrics are durable first."""
        session = self.session
        if session.log is not None:
            session.log.sync()
        built = session.built
        self.saver.begin(self.state, built.trained, session.optimizer, built.kept)
        self.timer.restart()
        self.stopwatch.lap()

    def end(self) -> None:
        """Wait for the last checkpoint, and export the result of a run that is complete."""
        self.saver.finish()
        if self.cadence.has_ended(self.state):
            written = write_result(self.config, self.session, self.layout, self.state)
            logger.info(
                "done%s: %s tokens; %s written",
                ending(self.cadence, self.state),
                f"{self.state.tokens:,}",
                written,
            )
        else:
            step = self.state.step
            logger.info("stopped on request after step %d; continue with --resume", step)
        if self.session.log is not None:
            self.session.log.close()
