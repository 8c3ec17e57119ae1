"""The config of an adapter that PEFT has written, and what of it can be merged.

Read against PEFT 0.21.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from pydantic import ValidationError

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.json_text import read_json_object
from headrace.schemas.publish import write_atomic
from headrace.schemas.train.model_overrides import ModelOverrides

CONFIG_NAME = "adapter_config.json"
RECORD_NAME = "model_overrides.json"  # beside an adapter: what the model under it must have
# settings that change more than the weights that an ordinary merge changes
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# starting values that leave the base model's weights as they are
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_peft_settings(adapter: Path) -> LoraConfig:
    """Read the config of an adapter that can be merged.

    Raises:
        ConfigError: it is of a kind, or has a setting, that cannot, by its name.
        DataError: it cannot be read.
    """
    path = adapter / CONFIG_NAME
    values = read_json_object(path)
    check_settings(path, values)
    try:
        settings = LoraConfig.from_pretrained(str(adapter))
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}; fetch the adapter again") from None
    settings.base_model_name_or_path = None  # the base model may have moved, or be a merged one
    settings.init_lora_weights = True
    settings.inference_mode = False  # which tells trained parts of saved modules from frozen ones
    return settings


def check_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what a merge would pass over.

    Raises:
        ConfigError, DataError: naming the setting.
    """
    if values.get("peft_type") != "LORA":
        raise ConfigError(
            f"{path}: peft_type {values.get('peft_type')} is not supported; LORA alone is, DoRA "
            "with it. Merge it with PEFT's merge_and_unload"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(values.get(name, 8), int | float) or isinstance(values.get(name), bool):
            raise DataError(f"{path}: {name} = {values[name]!r} is no number; fetch it again")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in values.items():
        if value and (name in UNSUPPORTED or name not in known):
            raise ConfigError(
                f"{path}: {name} is not supported; merge it with PEFT's merge_and_unload"
            )
    if values.get("bias", "none") != "none":
        raise ConfigError(
            f"{path}: bias = {values['bias']}: trained biases are not supported; merge it with "
            "PEFT's merge_and_unload"
        )
    start = values.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ConfigError(
            f"{path}: init_lora_weights = {start}: the adapter belongs to weights from which its "
            "start was taken out; convert it by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def write_overrides(directory: Path, overrides: ModelOverrides) -> None:
    """Write a record of what the model under an adapter must have, if that is not its own."""
    if overrides != ModelOverrides():
        text = json.dumps(overrides.model_dump(exclude_none=True, exclude_defaults=True), indent=1)
        write_atomic(directory / RECORD_NAME, text + "\n")


def read_overrides(adapter: Path) -> ModelOverrides:
    """Read the record beside an adapter; nothing differs where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = adapter / RECORD_NAME
    if not path.is_file():
        return ModelOverrides()
    try:
        return ModelOverrides.model_validate(read_json_object(path))
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg']}; fetch the adapter again") from None
