"""The training loop: feed, step, report, evaluate, save."""

import logging
from dataclasses import asdict

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.run_state import RunState
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.checkpoint.saver import Saver
from headrace.trainer.messages import gather
from headrace.trainer.metrics.metrics import AnswerFacts, mean_loss
from headrace.trainer.metrics.outcome import Anomaly
from headrace.trainer.metrics.step_losses import StepLosses
from headrace.trainer.optim import gradients, relora
from headrace.trainer.optim.loss_scale import LossScale, scale_of
from headrace.trainer.optim.optimizer import set_learning_rate
from headrace.trainer.optim.regularizers import ProductNorms
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.timeline import TimelineLog, traced
from headrace.trainer.run.anomalies import NOTHING_TRAINED, deal_with, judge, overflow
from headrace.trainer.run.cadence import Cadence, Stopwatch, Timer, is_multiple
from headrace.trainer.run.optimizer_step import hold_back, step_rate
from headrace.trainer.run.run_log import (
    ending,
    note_quarantined,
    run_evaluation,
    write_result,
    write_steps,
)
from headrace.trainer.run.session import Session
from headrace.trainer.run.signals import SignalWatcher
from headrace.trainer.run.step_report import Report, memory_gib, step_facts
from headrace.trainer.run.unreported_steps import Interval

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    inputs: Inputs,
    layout: RankLayout,
    signals: SignalWatcher,
    session: Session,
) -> None:
    """Train to the end, or until a stop is asked for; every rank runs this.

    Raises:
        TrainingError: a step went wrong, and the policy is to stop.
        CheckpointError: a checkpoint could not be written.
    """
    loop = Loop(config, inputs, layout, signals, session)
    loop.begin()
    while not (loop.stopping or loop.cadence.has_ended(loop.state)):
        loop.step()
    loop.end()


class Loop:
    """One rank's way from the state that a run begins with to its end, step by step."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        layout: RankLayout,
        signals: SignalWatcher,
        session: Session,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.layout = layout
        self.signals = signals
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
        self.interval = Interval(layout, inputs.capacity)

    def begin(self) -> None:
        """Evaluate before the first step of a new run, where that is wanted."""
        if self.session.is_new and self.config.evaluation.before_first_step:
            self.state = run_evaluation(self.session, self.layout, self.state)
            self.timer.restart()
            self.stopwatch.lap()

    def step(self) -> None:
        """Take a step; where it is due, report, evaluate and save."""
        config, session, before = self.config, self.session, self.state
        scale = scale_of(config.dtype, before)
        factor = 1.0 if scale is None else scale.factor
        engine, optimizer, built = session.engine, session.optimizer, session.built
        inputs, answers, data_seconds = self.next_inputs()
        lr = step_rate(config, before.step, session.total_steps)
        set_learning_rate(optimizer, lr)
        is_traced = before.step + 1 == config.profile.trace_step
        with traced(session.run_directory, self.layout.rank, is_traced):
            losses = engine.forward_backward(
                inputs,
                derive_seed(config.seed, "dropout", before.step),
                statistics=is_multiple(before.step + 1, config.reporting.token_statistics_every),
                scale=factor,
            )
            with engine.timeline.span("OptimizerStep"):
                norm, norms = gradients.reduce(built, self.layout, optimizer, factor), None
                anomaly = self.find_anomaly(norm, losses, inputs.trained_tokens, scale)
                if anomaly is None or not anomaly.forbids_update:
                    parameters = gradients.stepped(built, optimizer)
                    gradients.clip(parameters, norm, config.optimizer.gradient_clipping)
                    optimizer.step()
                    every = config.reporting.adapter_norms_every
                    measures = is_multiple(before.step + 1, every)
                    norms = hold_back(config.regularization, built, lr, measures=measures)
                self.restart_adapters_if_due()
                optimizer.zero_grad()
        report = self.report_of(inputs, losses, answers, norms, data_seconds)
        self.note_step(inputs, report, lr, norm)
        if scale is not None:
            self.state = self.state.with_loss_scale(**asdict(scale.after(norm)))
        if anomaly is not None or self.cadence.reports(before, self.state):
            self.report_evaluate_save(before, anomaly)

    def next_inputs(self) -> tuple[StepInputs, AnswerFacts | None, float]:
        """Read a global batch and hand it out; also what replaced its rejected answers.

        Returns:
            This rank's inputs, facts of those answers, and the seconds that reading took.
        """
        session, answers = self.session, None
        timeline, waiting = session.engine.timeline, Stopwatch()
        timeline.begin()
        with timeline.span("data"):
            batch = session.feed.read()
        data_seconds = waiting.lap()
        if session.rejected_sampling is not None:
            with timeline.span("answers"):
                batch, answers = session.rejected_sampling.replace(batch, self.state.step)
        with timeline.span("data"):
            return session.feed.hand_out(batch), answers, data_seconds

    def find_anomaly(
        self, norm: float, losses: StepLosses, trained_tokens: int, scale: LossScale | None
    ) -> Anomaly | None:
        """Return what is wrong with a step; at every rank the same.

        Args:
            norm: of the whole gradient.
            trained_tokens: of the global batch.
            scale: of the loss, where it has one.
        """
        if not trained_tokens:
            return NOTHING_TRAINED
        if scale is not None and scale.overflows(norm):
            return overflow(scale.factor)
        loss = None
        if self.config.anomalies.spike_factor is not None:
            rows = gather(losses.rows, self.layout.world_group)
            loss = mean_loss(row for part in rows for row in part)
        return judge(self.config.anomalies, norm, loss, self.state.recent_losses)

    def restart_adapters_if_due(self) -> None:
        """Restart after the step being taken, where ReLoRA asks for it."""
        config, session, done = self.config, self.session, self.state.step + 1
        if relora.is_due(config.relora, done, session.total_steps):
            seed = derive_seed(config.seed, "relora", done)
            relora.restart(session.built, session.optimizer, config.relora, seed)

    def report_of(
        self,
        inputs: StepInputs,
        losses: StepLosses,
        answers: AnswerFacts | None,
        norms: ProductNorms | None,
        data_seconds: float,
    ) -> Report:
        """Return this rank's report to the others; waits for its losses."""
        stop_or_save = self.signals.poll()
        return Report(
            losses=losses.rows,
            rows=inputs.leader_rows,
            router_loss=losses.router_loss if self.layout.coordinates.tensor == 0 else None,
            memory_gib=memory_gib(),
            stop=stop_or_save.stop,
            save=stop_or_save.save or self.timer.is_due(),
            written=self.saver.progress(),
            quarantined=self.session.feed.take_quarantined(),
            data_seconds=data_seconds,
            norms=norms if self.layout.is_first_copy else None,
            tokens=losses.token_sample(),
            answers=answers if self.layout.leads else None,
        )

    def note_step(self, inputs: StepInputs, report: Report, lr: float, norm: float) -> None:
        """Move the state past a step, and keep its report until the ranks exchange theirs."""
        seconds, before, session = self.stopwatch.lap(), self.state, self.session
        self.state = before.after_step(
            next_row=inputs.position.next_row,
            waiting=inputs.position.waiting,
            tokens=inputs.tokens,
            seconds=seconds,
            overlong_rows=inputs.overlong.rows,
            overlong_tokens=inputs.overlong.tokens,
        )
        if self.timelines is not None:
            self.timelines.write(self.state.step, seconds, session.engine.timeline.take())
        facts = step_facts(
            inputs,
            step=self.state.step,
            epoch=session.data_history.epoch_at(self.state.rows_done),
            first_row=before.next_row,
            lr=lr,
            gradient_norm=norm,
            seconds=seconds,
            flops_per_token=session.built.flops_per_token / self.layout.dims.world,
        )
        self.interval.add(report, facts)

    def report_evaluate_save(self, before: RunState, anomaly: Anomaly | None) -> None:
        """Report the steps so far; evaluate and save where it is due after the last one."""
        wished = self.report(anomaly)
        if self.cadence.evaluates(before, self.state):
            self.state = run_evaluation(self.session, self.layout, self.state)
            self.stopwatch.lap()
        if wished or self.cadence.saves(before, self.state):
            self.save()

    def report(self, anomaly: Anomaly | None) -> bool:
        """Exchange and write down all steps not reported yet; whether anyone wishes a save.

        Args:
            anomaly: of the last of them.
        """
        done = self.interval.close()
        reports = [report for step in done for report in step.reports]
        self.saver.settle([report.written for report in done[-1].reports])
        self.stopping = any(report.stop for report in reports)
        kept = self.config.anomalies.losses_kept
        self.state = self.state.after_losses([step.loss for step in done], kept)
        self.state = note_quarantined(self.state, reports, self.session)
        write_steps(done[:-1], self.session, self.state)
        if anomaly is not None:
            directory, writes = self.session.run_directory, self.layout.rank == 0
            deal_with(anomaly, self.state, done[-1].rows, directory, writes=writes)
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
            written = write_result(self.config.checkpoint, self.session, self.layout, self.state)
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
