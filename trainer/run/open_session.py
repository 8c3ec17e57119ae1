"""Builds or resumes everything that a run is made of."""

import logging
from functools import partial
from pathlib import Path

import torch

from headrace.schemas.errors import CheckpointError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.train.run_state import RunState
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.checkpoint_files import MERGED, CheckpointTensors
from headrace.trainer.building.model_builder import build_chunks
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder, load_tensors, newest
from headrace.trainer.failure import wait_to_be_ended
from headrace.trainer.messages import from_first_rank, gather
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.metrics.reporters import open_reporters
from headrace.trainer.optim.open_optimizer import open_optimizer
from headrace.trainer.optim.parameter_groups import table_names
from headrace.trainer.optim.relora import check_relora, replay
from headrace.trainer.order.data_history import describe_change, open_history, resume_history
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.pipeline.interleaved_engine import InterleavedEngine
from headrace.trainer.pipeline.prompted_answers import Asked, asked_by_rows, open_prompted_answers
from headrace.trainer.pipeline.rejected_sampling import open_rejected_sampling
from headrace.trainer.pipeline.sliced_engine import SlicedEngine
from headrace.trainer.pipeline.transfers import Transfers
from headrace.trainer.run.evaluation_sets import build_evaluation_sets
from headrace.trainer.run.session import Session
from headrace.trainer.sequence_slice import SequenceSlice
from headrace.trainer.stage.acceleration import uses_kernels
from headrace.trainer.tensor_parallel.shard import TensorShard

logger = logging.getLogger(__name__)

LAYOUT = {  # what a resumed run takes from its own config and layout, not from the checkpoint
    "seed",
    "global_batch_rows",
    "stages",
    "replicas",
    "sequence_ranks",
    "tensor_ranks",
    "config_fingerprint",
    "data_fingerprint",
    "files",
    "weights_only",
}


def open_session(config: TrainConfig, inputs: Inputs, layout: RankLayout, resume: bool) -> Session:
    """Build the parts and, if asked, take up the newest checkpoint; every rank takes part.

    Raises:
        CheckpointError: the newest checkpoint is damaged.
        ConfigError, DataError: adapter or weights do not fit the model.
    """
    run_directory = Path(config.output_dir)
    folder = CheckpointFolder(
        run_directory, config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
    )
    built, optimizer = build_model(config, layout)
    publishes = layout.publishes(node_local=config.checkpoint.node_local)
    found = agreed_checkpoint(folder, layout, check_files=publishes) if resume else None
    state = fresh_state(config, inputs, layout)
    if found is not None:
        state = load_checkpoint(*found, state, inputs, built, optimizer)
    elif resume:
        logger.info("no checkpoint was written yet; starting from the first step")
    if publishes:
        folder.remove_leftovers()
    position = Position(state.next_row, tuple(state.waiting))
    state = with_data(state, config, inputs)
    data_history = open_history(
        config, inputs, state.data, min([position.next_row, *position.waiting])
    )
    run_length = from_first_rank(
        partial(
            find_run_length, config, inputs, data_history, state.step, position, state.quarantined
        ),
        layout,
    )
    loader = build_train_loader(config, inputs, layout, data_history, run_length.stop_row)
    if loader is not None:
        loader.seek(position)
        loader.reader.quarantine.restore(state.quarantined)
    describe(built, inputs, layout, run_length.total_steps)
    warn_of_long_warmup(config, run_length.total_steps)
    asked: list[Asked] = []
    if layout.leads:
        asked += asked_by_rows(config, inputs, config.evaluation.prompt_rows)
    return Session(
        model=model_directory(config.model, config.weights),
        run_directory=run_directory,
        built=built,
        engine=build_engine(built, config, layout),
        optimizer=optimizer,
        feed=Feed(layout, loader),
        rejected_sampling=open_rejected_sampling(config, inputs, layout, built),
        evaluation_sets=build_evaluation_sets(config, inputs, layout),
        prompted=open_prompted_answers(config, config.evaluation, asked, inputs, layout, built),
        folder=folder,
        log=open_log(config, state.step if found else -1) if layout.rank == 0 else None,
        data_history=data_history,
        total_steps=run_length.total_steps,
        state=state,
        is_new=found is None,
    )


def with_data(state: RunState, config: TrainConfig, inputs: Inputs) -> RunState:
    """Return a state whose last segment of data is the config's; a change of it is said."""
    data = resume_history(state.data, config, inputs, state.next_row)
    if state.data and data != state.data:
        logger.warning("%s", describe_change(data[-1]))
    return state.model_copy(update={"data": data})


def build_model(
    config: TrainConfig, layout: RankLayout
) -> tuple[BuiltStage, torch.optim.Optimizer]:
    """Build this rank's part of the model, and the optimizer of what is trained in it."""
    rows = SequenceSlice(layout.coordinates.sequence, layout.dims.sequence, layout.sequence_group)
    shard = TensorShard(layout.coordinates.tensor, layout.dims.tensor, layout.tensor_group)
    built = build_chunks(
        config, layout.stage, layout.device, plan_model(config), rows, shard, layout.copies_group
    )
    optimizer = open_optimizer(
        config.optimizer,
        built.trained,
        layout,
        triton=uses_kernels(config, layout.device),
        tables=table_names(built),
    )
    if config.relora.every_steps is not None:
        check_relora(built)
    return built, optimizer


def load_checkpoint(
    path: Path,
    saved: RunState,
    fresh: RunState,
    inputs: Inputs,
    built: BuiltStage,
    optimizer: torch.optim.Optimizer,
) -> RunState:
    """Put a checkpoint's values into a stage and its optimizer.

    Returns:
        The saved state, over the layout of the fresh one.
    """
    state = saved.model_copy(update={name: getattr(fresh, name) for name in LAYOUT})
    replay(built, CheckpointTensors(path).all(MERGED))
    load_tensors(path, built.trained, None if saved.weights_only else optimizer)
    if saved.weights_only:
        logger.warning("%s holds weights only; the optimizer begins anew", path)
    if saved.global_batch_rows != inputs.global_batch_rows:
        logger.warning(
            "global batches of %d rows up to row %d, and of %d from there on",
            saved.global_batch_rows,
            saved.next_row,
            inputs.global_batch_rows,
        )
    logger.info("resuming from %s, after step %d", path, state.step)
    return state


def warn_of_long_warmup(config: TrainConfig, total_steps: int) -> None:
    """Say that the learning rate will not be reached, where it will not."""
    if config.scheduler.warmup_steps > total_steps:
        logger.info(
            "warning: scheduler.warmup_steps = %d, but the run has %d steps; the learning rate "
            "never reaches optimizer.lr",
            config.scheduler.warmup_steps,
            total_steps,
        )


def agreed_checkpoint(
    folder: CheckpointFolder, layout: RankLayout, *, check_files: bool
) -> tuple[Path, RunState] | None:
    """Find the newest checkpoint that every rank has; None if there is none.

    No rank opens its files before those that hash them have found them sound, and of a damaged one
    a single rank tells.

    Args:
        check_files: whether this rank hashes them.

    Raises:
        CheckpointError: it is damaged.
    """
    names = [path.name for path in folder.finished()]
    everywhere = set.intersection(*map(set, gather(names, layout.world_group)))
    found, problem = None, None
    try:
        found = newest(folder, check_files=check_files, among=everywhere)
    except CheckpointError as error:
        problem = error
    problems = gather(None if problem is None else str(problem), layout.world_group)
    blamed = [rank for rank, text in enumerate(problems) if text is not None]
    if not blamed:
        return found
    if layout.rank != blamed[0]:
        wait_to_be_ended()
    raise CheckpointError(problems[blamed[0]])


def build_engine(built: BuiltStage, config: TrainConfig, layout: RankLayout) -> StageEngine:
    """The engine of the config's schedule; every rank takes part."""
    timed, sliced = config.profile.timeline, config.sequence_slices > 1
    if config.schedule == "1f1b" and not sliced:
        return StageEngine(built.chunks, config, layout, timed=timed)
    width = built.architecture.stream.width
    engine = SlicedEngine if sliced else InterleavedEngine
    return engine(built.chunks, config, layout, width, Transfers(layout), timed=timed)


def open_log(config: TrainConfig, step: int) -> MetricsLog:
    """Open the metrics log of the first rank, from a resume point on."""
    run_directory = Path(config.output_dir)
    settings = config.model_dump(mode="json")
    return MetricsLog(
        run_directory, step, open_reporters(config.reporting, settings, run_directory)
    )


def fresh_state(config: TrainConfig, inputs: Inputs, layout: RankLayout) -> RunState:
    """Return the state of a new run."""
    return RunState(
        step=0,
        next_row=0,
        seed=config.seed,
        tokens=0,
        seconds=0.0,
        global_batch_rows=inputs.global_batch_rows,
        stages=layout.stages,
        replicas=layout.replicas,
        sequence_ranks=layout.dims.sequence,
        tensor_ranks=layout.dims.tensor,
        config_fingerprint=fingerprint(config.model_dump(mode="json")),
        data_fingerprint=inputs.data_fingerprint,
        files={},
    )


def describe(built: BuiltStage, inputs: Inputs, layout: RankLayout, total_steps: int) -> None:
    """Say once what is about to run."""
    counts = (
        sum(len(chunk) for chunk in built.layers),
        sum(item.shape.numel() for item in built.trained if item.owned),
    )
    stages = gather(counts, layout.pipeline_group)
    layers = " + ".join(str(count) for count, _ in stages)
    trained = sum(count for _, count in stages)
    logger.info(
        "%d stage(s) of %s layers x %d replica(s)%s%s on %s, %s; %s trained parameters",
        layout.stages,
        layers,
        layout.replicas,
        f" x {shares} shares of rows" if (shares := layout.dims.sequence) > 1 else "",
        f" x {parts} parts of weights" if (parts := layout.dims.tensor) > 1 else "",
        layout.device.type,
        str(built.chunks[0].compute_dtype).removeprefix("torch."),
        f"{trained:,}",
    )
    logger.info(
        "%d steps of %d sequences of %d tokens; %s rows an epoch",
        total_steps,
        inputs.global_batch_rows,
        inputs.sequence_tokens,
        f"{inputs.rows_per_epoch:,}",
    )
