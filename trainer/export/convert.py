"""A checkpoint into what others read, without the processes that wrote it and without a GPU."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from headrace.schemas.checkpoint_names import (
    CHECKPOINTS_FOLDER,
    checkpoint_name,
    published_checkpoints,
)
from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.schemas.progress import Progress, silent
from headrace.schemas.toml_config import without_defaults
from headrace.schemas.train.run_state import RUN_CONFIG_NAME, read_run_state
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.adapters.history import AdapterHistory
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.model_writer import (
    ModelWriter,
    as_saved,
    copy_model_files,
    file_count,
    write_index,
    write_tokenizer,
)
from headrace.trainer.building.checkpoint_files import INITIAL, MERGED, PARAMETER, CheckpointTensors
from headrace.trainer.building.directory_weights import StoredWeights
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.parameter_slots import Slot, find_slots, stored_buffers
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.building.weight_source import WeightSource, grown
from headrace.trainer.export.export import saved_dtype, stored_dtype
from headrace.trainer.export.model_card import write_card
from headrace.trainer.export.output import check_new, new_output


def convert(
    run: Path,
    output: Path,
    step: int | None = None,
    model: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the adapter or the model that a run had at one of its checkpoints.

    Args:
        step: of the checkpoint; None takes the newest.
        model: where the base model is now, if not where the run's config says.

    Returns:
        The checkpoint.

    Raises:
        ConfigError, CheckpointError: no run, no such checkpoint, or a damaged one.
    """
    check_new(output)
    checkpoint = find_checkpoint(run, step)
    read_run_state(checkpoint)
    config = run_config(run, model)
    beta1 = config.optimizer.beta1 if config.optimizer.record.averages else None
    tensors = CheckpointTensors(checkpoint, beta1)
    plan = plan_model(config)
    with new_output(output) as temporary:
        temporary.mkdir()
        if not plan.method.trains_base:
            write_adapter(config, plan.method, tensors, temporary)
        else:
            stored = stored_dtype(plan.architecture.config)
            dtype = saved_dtype(config.checkpoint.save_dtype, stored)
            write_model(
                plan,
                tensors,
                model_directory(config.model, config.weights),
                temporary,
                dtype,
                progress,
            )
        write_card(temporary, run, int(checkpoint.name.rpartition("-")[2]))
    return checkpoint


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint after a step, or the newest.

    Raises:
        CheckpointError: there is none, with the names of the others.
    """
    folder = run / CHECKPOINTS_FOLDER
    found = published_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoints; name a run directory")
    if step is None:
        return found[-1]
    if folder / checkpoint_name(step) not in found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: no checkpoint after step {step}, but {names}")
    return folder / checkpoint_name(step)


def run_config(run: Path, model: Path | None) -> TrainConfig:
    """The config that a run was started with."""
    path = run / RUN_CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a run directory") from None
    if model is not None:
        values["model"] = str(model)
    start = values["adapter"].get("path")
    if start and not Path(start).exists():  # which the checkpoint is no longer in need of
        values["adapter"]["path"] = None
    try:
        return TrainConfig.model_validate(without_defaults(TrainConfig, values))
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {error.errors()[0]['msg']}; it is of another release, convert with that one"
        ) from None


def write_adapter(
    config: TrainConfig, method: TuningMethod, tensors: CheckpointTensors, output: Path
) -> None:
    """Write the same adapter, bit by bit, that training itself would have exported.

    Raises:
        CheckpointError: adapters took over weights, and the checkpoint does not hold how they did.
    """
    values = {name: tensors.parameter(name) for name in tensors.named(PARAMETER)}
    history = AdapterHistory(tensors.all(INITIAL), tensors.all(MERGED))
    if config.adapter.takes_over and not history.initial:
        raise CheckpointError(
            "the checkpoint is of an earlier release and does not hold what the adapters started "
            "from; resume the run and let it end instead"
        )
    dtype = saved_dtype(config.checkpoint.save_dtype, torch.float32)
    exported = {name: value.to(dtype) for name, value in history.exported(values).items()}
    method.write(output, exported, history.width, model_directory(config.model, config.weights))


def write_model(
    plan: Plan,
    tensors: CheckpointTensors,
    base: Path,
    output: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """A Hugging Face model, module by module: trained weights of the checkpoint, the others of the
    base model.
    """
    architecture, skeleton = plan.architecture, plan.plain
    family = architecture.family
    paths = architecture.parts
    if architecture.tied:
        paths.remove(family.head)
    slots = {path: list(find_slots({path: architecture.part(skeleton, path)})) for path in paths}
    sizes = {p: sum(s.empty.numel() for s in slots[p]) * dtype.itemsize for p in paths}
    writer = ModelWriter(output, skeleton, 0, file_count(list(sizes.values())))
    stored = StoredWeights(base, skeleton)
    stored.tell_unexpected()
    with grown(stored, architecture) as source:
        for path in progress(paths, list(sizes.values()), "convert"):
            values = module_values(slots[path], plan, tensors, source)
            values = as_saved(skeleton, values, dtype)
            writer.add(values | module_buffers(path, plan, source), sizes[path])
    write_index(output, writer.finish())
    copy_model_files(base, output, skeleton, dtype)
    write_tokenizer(base, output, architecture.overrides.new_tokens)


def module_buffers(path: str, plan: Plan, source: WeightSource) -> dict[str, Tensor]:
    """A module's buffers, those that the base model's files hold."""
    slots = stored_buffers({path: plan.architecture.part(plan.plain, path)})
    wanted = [(plan.method.stored_name(slot.name), slot.value.shape) for slot in slots]
    values = zip(slots, source.read_buffers(wanted), strict=True)
    return {slot.name: value for slot, value in values if value is not None}


def module_values(
    slots: list[Slot], plan: Plan, tensors: CheckpointTensors, source: WeightSource
) -> Mapping[str, Tensor]:
    """A module's parameters by name."""
    trained, stored = set(tensors.named(PARAMETER)), plan.method.stored_name
    values: dict[str, Any] = {s.name: tensors.parameter(s.name) for s in slots if s.name in trained}
    rest = [slot for slot in slots if slot.name not in trained]
    read = source.read([(stored(slot.name), slot.empty.shape) for slot in rest])
    return values | {slot.name: value for slot, value in zip(rest, read, strict=True)}
