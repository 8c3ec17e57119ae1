"""The training loop: feed, step, report, evaluate, save."""

import logging
import math
import time
from functools import partial
from pathlib import Path

import torch

from headrace.schemas.errors import TrainingError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.run_state import RunState
from headrace.schemas.train_config import TrainConfig
from headrace.trainer import gradients
from headrace.trainer.checkpoint import CheckpointFolder, load_tensors, newest
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.engine import StageEngine
from headrace.trainer.evaluation import EvaluationSet, evaluate
from headrace.trainer.export import export
from headrace.trainer.feed import Feed
from headrace.trainer.metrics import MetricsLog, console_line
from headrace.trainer.model_builder import BuiltStage, build_stage
from headrace.trainer.optimizer import build_optimizer, learning_rate, set_learning_rate
from headrace.trainer.preflight import Inputs
from headrace.trainer.setup import build_evaluation_sets, build_train_loader
from headrace.trainer.step_report import StepFacts, make_report, step_metrics
from headrace.trainer.stop_signal import StopSignal

logger = logging.getLogger(__name__)

POSITION = {"step", "next_row", "tokens", "seconds"}  # what a resumed run takes from a checkpoint


def train(
    config: TrainConfig, inputs: Inputs, layout: Layout, stop: StopSignal, resume: bool
) -> None:
    """Train to the end, or until a stop is asked for; every rank runs this.

    Raises:
        TrainingError: the gradient is not finite.
    """
    run_directory = Path(config.output_dir)
    folder = CheckpointFolder(run_directory, config.checkpoint.keep_last)
    built = build_stage(config, layout.stage, layout.device)
    engine = StageEngine(built.stage, config, layout)
    optimizer = build_optimizer(config.optimizer, built.trained)
    loader = build_train_loader(config, inputs, layout)
    feed = Feed(layout, loader)
    evaluation_sets = build_evaluation_sets(config, inputs, layout)

    if layout.rank == 0:
        folder.remove_leftovers()
    state = fresh_state(config, inputs, layout)
    found = newest(folder, check_files=layout.rank == 0) if resume else None
    if found is not None:
        path, saved = found
        state = state.model_copy(update=saved.model_dump(include=POSITION))
        load_tensors(path, built.trained, optimizer)
        logger.info("resuming from %s: step %d of %d", path, state.step, inputs.total_steps)
    elif resume:
        logger.info("no checkpoint was written yet; starting from the first step")
    if loader is not None:
        loader.load_state_dict({"next_row": state.next_row})
    log = MetricsLog(run_directory, state.step if found else -1) if layout.rank == 0 else None
    describe(built, inputs, layout)

    if found is None and config.evaluation.before_first_step:
        run_evaluation(evaluation_sets, engine, layout, state.step, log)
    last_save = time.monotonic()
    steps_here, seconds_here = 0, 0.0
    while state.step < inputs.total_steps and not stop.agreed:
        started = time.perf_counter()
        step_inputs = feed.next()
        lr = learning_rate(config.optimizer, config.scheduler, state.step, inputs.total_steps)
        set_learning_rate(optimizer, lr)
        norms: list[float] = []
        finish = partial(
            finish_step, built, optimizer, layout, config.optimizer.gradient_clipping, norms
        )
        losses = engine.train_step(
            step_inputs, derive_seed(config.seed, "dropout", state.step), finish
        )

        due = minutes_since(last_save) >= (config.checkpoint.every_minutes or math.inf)
        report = make_report(losses, step_inputs, stop=stop.requested, save=due)
        reports = gather_objects(report, layout.world_group)
        stop.agreed = any(report.stop for report in reports)
        seconds = time.perf_counter() - started
        first_row, next_row = (
            state.next_row,
            min(state.next_row + inputs.global_batch_rows, inputs.stop_row),
        )
        state = state.model_copy(
            update={
                "step": state.step + 1,
                "next_row": next_row,
                "tokens": state.tokens + step_inputs.tokens,
                "seconds": state.seconds + seconds,
            }
        )
        steps_here, seconds_here = steps_here + 1, seconds_here + seconds
        if log is not None:
            facts = StepFacts(
                state.step, first_row, inputs.rows_per_epoch, next_row, lr, norms[0], seconds
            )
            metrics = step_metrics(reports, step_inputs, facts)
            log.write(metrics)
            left = (inputs.total_steps - state.step) * seconds_here / steps_here
            logger.info("%s", console_line(metrics, inputs.total_steps, left))

        last = state.step == inputs.total_steps
        every = config.evaluation.every_steps
        if (last and config.evaluation.after_last_step) or (every and state.step % every == 0):
            run_evaluation(evaluation_sets, engine, layout, state.step, log)
        every = config.checkpoint.every_steps
        wished = stop.agreed or any(report.save for report in reports)
        if last or wished or (every and state.step % every == 0):
            if log is not None:
                log.sync()
            path = folder.save(state, built.trained, optimizer, layout)
            last_save = time.monotonic()
            logger.info("saved %s", path)

    if state.step < inputs.total_steps:
        logger.info("stopped on request after step %d; continue with --resume", state.step)
    else:
        path = export(built, layout, Path(config.model), run_directory)
        logger.info("done: %s tokens; %s written", f"{state.tokens:,}", path)
    if log is not None:
        log.close()


def finish_step(
    built: BuiltStage,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    largest_norm: float,
    norms: list[float],
) -> None:
    """Reduce, measure and clip the gradients, then step; the unclipped norm goes to `norms`."""
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
    norms.append(norm)


def run_evaluation(
    sets: list[EvaluationSet],
    engine: StageEngine,
    layout: Layout,
    step: int,
    log: MetricsLog | None,
) -> None:
    """Evaluate and write the results down."""
    for result in evaluate(sets, engine, layout, step):
        if log is not None:
            log.write(result)
        logger.info(
            "evaluation %s after step %d: loss %.4f over %s tokens in %.1f s",
            result.name,
            step,
            result.loss,
            f"{result.trained_tokens:,}",
            result.seconds,
        )


def fresh_state(config: TrainConfig, inputs: Inputs, layout: Layout) -> RunState:
    """Before the first step."""
    return RunState(
        step=0,
        next_row=0,
        seed=config.seed,
        tokens=0,
        seconds=0.0,
        global_batch_rows=inputs.global_batch_rows,
        stages=layout.stages,
        replicas=layout.replicas,
        config_fingerprint=config.fingerprint(),
        data_fingerprint=inputs.data_fingerprint,
        files={},
    )


def describe(built: BuiltStage, inputs: Inputs, layout: Layout) -> None:
    """Say once what is about to run."""
    counts = (
        len(built.layers),
        sum(item.parameter.numel() for item in built.trained if item.owned),
    )
    stages = gather_objects(counts, layout.pipeline_group)
    layers = " + ".join(str(count) for count, _ in stages)
    trained = sum(count for _, count in stages)
    logger.info(
        "%d stage(s) of %s layers x %d replica(s) on %s, %s; %s trained parameters",
        layout.stages,
        layers,
        layout.replicas,
        layout.device.type,
        str(built.stage.compute_dtype).removeprefix("torch."),
        f"{trained:,}",
    )
    logger.info(
        "%d steps of %d rows of %d tokens; %s rows an epoch",
        inputs.total_steps,
        inputs.global_batch_rows,
        inputs.sequence_len,
        f"{inputs.rows_per_epoch:,}",
    )


def minutes_since(moment: float) -> float:
    return (time.monotonic() - moment) / 60
