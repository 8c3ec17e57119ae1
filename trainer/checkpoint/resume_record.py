"""Settings that must stay the same when a run is resumed, and those that may change.

Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.schemas.train.data_config import LoaderConfig
from headrace.schemas.train.run_state import RUN_CONFIG_NAME
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.order.datasets import RANDOM, Inputs

# settings that a resumed run may change; the rows of each step stay the same with all of them
FREE_ON_RESUME = {
    "output_dir",
    "pipeline_stages",
    "sequence_parallel",
    "sequence_slices",
    "tensor_parallel",
    "schedule",
    "stage_chunks",
    "partition",
    "neighbors",
    "half_layers",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "activation_offload",
    "tiles",
    "weight_offload",
    "weight_shard",
    "embedding_on_cpu",
    "kernels",
    "compile",
    "threads",
    "evaluation_datasets",
    "evaluation",
    "checkpoint",
    "anomalies",
    "profile",
    "reporting",
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
# settings of other tables that say where something lies
PLACES = ("quantization.cache", "optimizer.shard", "optimizer.offload")
NOT_COMPARED = {"config", "global batch (rows)"}
DATA_SETTINGS = ("datasets.", "mixing", "epochs", "max_steps", "fingerprint of the data")
WEIGHTS_KEY = "fingerprint of the model's weights"
CONFIG_KEY = "fingerprint of the model's config.json"
MODEL_KEYS = (WEIGHTS_KEY, CONFIG_KEY)


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
    saved = read_record(path)
    now = resume_record(config, inputs)
    defaults = now.keys() - resume_record(config, inputs, exclude_defaults=True).keys()
    free = free_with_schedule(config)
    for key in now | saved:
        if key not in saved and (key in defaults or key in MODEL_KEYS):
            continue  # a setting that came with a later release
        if key == "model" and is_same_model(saved, now):
            continue  # it has moved, or has another name
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


def read_record(path: Path) -> dict[str, object]:
    """Read what a run has recorded of itself, flat.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return flatten({key: value for key, value in saved.items() if key not in NOT_COMPARED})
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); restore it from a copy, or start a new run in "
            "another output_dir"
        ) from None


def is_same_model(saved: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """Return whether two records are of one model, by its files instead of its name."""
    known = saved.get(WEIGHTS_KEY) not in (None, RANDOM)
    return known and all(saved.get(key, now[key]) == now[key] for key in MODEL_KEYS)


def free_with_schedule(config: TrainConfig) -> set[str]:
    """Return the settings free to change since no learning rate so far depends on them."""
    free = {"scheduler.force_constant_lr"}
    return free if config.scheduler.has_horizon else free | {"epochs", "max_steps"}


def resume_record(
    config: TrainConfig, inputs: Inputs, exclude_defaults: bool = False
) -> dict[str, object]:
    """Return the settings that must stay the same over all resumptions of a run."""
    values = config.model_dump(
        mode="json", exclude=FREE_ON_RESUME, exclude_defaults=exclude_defaults
    )
    record = flatten(values)
    for name in LOADER_SETTINGS_FREE:
        record.pop(f"loader.{name}", None)
    for name in PLACES:
        record.pop(name, None)
    if config.rejected_sampling is not None:  # also where all of its values are defaults
        record["rejected_sampling"] = "on"
    return record | {
        "fingerprint of the data": inputs.data_fingerprint,
        WEIGHTS_KEY: inputs.weights_fingerprint,
        CONFIG_KEY: inputs.model_config_fingerprint,
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
