"""What can be known wrong before a process group or a GPU is touched. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.schemas.errors import CheckpointError, ConfigError, DataError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.manifest import Manifest
from headrace.schemas.shard_format import EVALUATION
from headrace.schemas.train_config import LoaderConfig, TrainConfig
from headrace.trainer.data_plan import DataPlan, plan_data
from headrace.trainer.families import check_family, text_settings
from headrace.trainer.model_directory import model_directory
from headrace.trainer.row_group_source import patience_of
from headrace.trainer.storage import open_storage
from headrace.trainer.weight_index import weights_fingerprint

# settings that a resumed run may change; the rows of each step stay the same with all of them
FREE_ON_RESUME = {
    "output_dir",
    "pipeline_stages",
    "partition",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "kernels",
    "compile",
    "threads",
    "evaluation_datasets",
    "evaluation",
    "checkpoint",
    "anomalies",
    "profile",
}
LOADER_SETTINGS_KEPT = {
    "shuffle",
    "shuffle_window",
    "pack",
    "tokens_per_row",
    "look_ahead",
    "overlong",
}
LOADER_SETTINGS_FREE = LoaderConfig.model_fields.keys() - LOADER_SETTINGS_KEPT
NOT_COMPARED = {"config", "global batch (rows)"}
DATA_SETTINGS = ("datasets.", "mixing", "epochs", "max_steps", "fingerprint of the data")
RUN_CONFIG_NAME = "train.json"
WEIGHTS_KEY = "fingerprint of the model's weights"


@dataclass(frozen=True)
class Inputs:
    """The manifests that a run reads, and what follows from them and the number of processes."""

    train: list[Manifest]
    evaluation: list[Manifest]
    place_tokens: int  # tokens of each place in a micro-batch: of a row, or of several if packed
    plan: DataPlan
    rows_per_epoch: int
    replicas: int
    global_batch_rows: int
    data_fingerprint: str
    weights_fingerprint: str


def check(config: TrainConfig, processes: int) -> Inputs:
    """Check model, shards and layout against each other.

    Raises:
        ConfigError, DataError: one line that says what to do.
    """
    if processes % config.pipeline_stages:
        raise ConfigError(
            f"pipeline_stages = {config.pipeline_stages} does not divide the {processes} "
            f"processes; launch a multiple of {config.pipeline_stages}"
        )
    directory = model_directory(config.model)
    model = read_model_config(directory)
    check_family(config.model, model)
    text = text_settings(model)
    check_model(config, text)
    train = [manifest_of(dataset.path, config) for dataset in config.datasets]
    evaluation = [manifest_of(dataset.path, config) for dataset in config.evaluation_datasets]
    paths = [d.path for d in config.datasets] + [d.path for d in config.evaluation_datasets]
    for path, manifest in zip(paths, train + evaluation, strict=True):
        check_shards(path, manifest, directory, text, config.weights == "random")
    place_tokens = find_place_tokens(config, train + evaluation)
    plan = plan_data(config, train)
    for dataset, manifest in zip(config.evaluation_datasets, evaluation, strict=True):
        if not any(shard.rows for shard in manifest.split(EVALUATION)):
            raise DataError(
                f"{dataset.path}: no evaluation rows; prepare with a larger evaluation_fraction, "
                "or leave it out of evaluation_datasets"
            )
    replicas = processes // config.pipeline_stages
    batch = config.micro_batch_size * config.gradient_accumulation_steps * replicas
    return Inputs(
        train=train,
        evaluation=evaluation,
        place_tokens=place_tokens,
        plan=plan,
        rows_per_epoch=plan.rows_in(1),
        replicas=replicas,
        global_batch_rows=batch,
        weights_fingerprint=(
            "random" if config.weights == "random" else weights_fingerprint(directory)
        ),
        data_fingerprint=fingerprint([manifest.model_dump(mode="json") for manifest in train]),
    )


def find_place_tokens(config: TrainConfig, manifests: list[Manifest]) -> int:
    """Tokens of a place. Unpacked rows have a place each, so all datasets must agree on it."""
    lengths = {manifest.sequence_len for manifest in manifests}
    longest = max(lengths)
    if config.loader.pack == "none":
        if len(lengths) > 1:
            raise DataError(
                f"datasets differ in sequence_len ({', '.join(map(str, sorted(lengths)))}); "
                'prepare them with the same one, or pack rows: loader.pack = "best_fit"'
            )
        return longest
    tokens = config.loader.tokens_per_row or longest
    if longest > tokens and config.loader.overlong == "error":
        raise ConfigError(
            f"loader.tokens_per_row = {tokens}, but rows may have up to {longest} tokens; "
            'raise it, or set loader.overlong to "truncate" or "drop"'
        )
    return tokens


def manifest_of(path: str, config: TrainConfig) -> Manifest:
    """The manifest of a local or remote shard directory."""
    return open_storage(path, patience_of(config.loader)).manifest()


def read_model_config(model: Path) -> dict[str, object]:
    """config.json of a model directory."""
    path = model / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: not found; `model` must be a Hugging Face model directory")
    try:
        values: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    return values


def check_model(config: TrainConfig, model: Mapping[str, object]) -> None:
    """There must be a layer for each stage."""
    layers = model.get("num_hidden_layers")
    if isinstance(layers, int) and config.pipeline_stages > layers:
        raise ConfigError(
            f"pipeline_stages = {config.pipeline_stages}, but {config.model} has {layers} layers; "
            f"use at most {layers}"
        )


def check_shards(
    path: str, manifest: Manifest, model: Path, model_config: Mapping[str, object], random: bool
) -> None:
    """Shards must come from the model's tokenizer and fit its positions and vocabulary.

    Args:
        random: the weights are made up, so that a tokenizer may be missing.
    """
    if manifest.kind != "causal":
        raise DataError(
            f'{path}: kind "{manifest.kind}" cannot be trained on yet; use causal shards'
        )
    tokenizer = model / "tokenizer.json"
    if not tokenizer.is_file() and not random:
        raise ConfigError(
            f"{tokenizer}: not found; the model directory must hold the tokenizer of the shards"
        )
    if tokenizer.is_file() and file_sha256(tokenizer) != manifest.tokenizer.fingerprint:
        raise DataError(
            f"{path}: made with another tokenizer than {tokenizer}; "
            "prepare the shards with this model's"
        )
    vocabulary = model_config.get("vocab_size")
    if isinstance(vocabulary, int) and manifest.tokenizer.vocabulary_size > vocabulary:
        raise DataError(
            f"{path}: ids up to {manifest.tokenizer.vocabulary_size - 1}, "
            f"but the model has {vocabulary} embeddings"
        )
    positions = model_config.get("max_position_embeddings")
    if isinstance(positions, int) and manifest.sequence_len > positions:
        raise DataError(
            f"{path}: sequence_len {manifest.sequence_len} is above the model's {positions} "
            "positions; prepare shorter rows"
        )


def check_run_directory(
    config: TrainConfig, inputs: Inputs, resume: bool, data_may_change: bool = False
) -> None:
    """A new run starts in a fresh directory; a resumed one computes what it computed before.

    Args:
        data_may_change: go on with other datasets, weights or length of the run.

    Raises:
        ConfigError, CheckpointError: naming the setting that differs.
    """
    path = Path(config.output_dir) / RUN_CONFIG_NAME
    if not resume:
        if path.exists():
            raise ConfigError(
                f"{config.output_dir}: holds a run already; add --resume to continue it, "
                "or choose another output_dir"
            )
        return
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found, so there is no run to resume; leave --resume out to start one"
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved = flatten({key: value for key, value in saved.items() if key not in NOT_COMPARED})
    now = resume_record(config, inputs)
    defaults = now.keys() - resume_record(config, inputs, exclude_defaults=True).keys()
    free = free_with_schedule(config)
    for key in now | saved:
        if key not in saved and (key in defaults or key == WEIGHTS_KEY):
            continue  # a setting that came with a later release
        if key in free:
            continue
        of_data = key.startswith(DATA_SETTINGS)
        if saved.get(key) == now.get(key) or (of_data and data_may_change):
            continue
        otherwise = "add --data-changed=continue to go on with other data, " if of_data else ""
        raise CheckpointError(
            f"{path}: {key} was {saved.get(key)!r} and is {now.get(key)!r}; "
            f"resume with the old value, {otherwise}or start a new run in another output_dir"
        )


def free_with_schedule(config: TrainConfig) -> set[str]:
    """What a resumed run may change because no learning rate up to there depends on it."""
    free = {"scheduler.force_constant_lr"}
    return free if config.scheduler.has_horizon else free | {"epochs", "max_steps"}


def resume_record(
    config: TrainConfig, inputs: Inputs, exclude_defaults: bool = False
) -> dict[str, object]:
    """What must stay the same over all resumptions of a run."""
    values = config.model_dump(
        mode="json", exclude=FREE_ON_RESUME, exclude_defaults=exclude_defaults
    )
    record = flatten(values)
    for name in LOADER_SETTINGS_FREE:
        record.pop(f"loader.{name}", None)
    return record | {
        "fingerprint of the data": inputs.data_fingerprint,
        WEIGHTS_KEY: inputs.weights_fingerprint,
    }


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested tables, and lists of them, as dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): table for number, table in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
