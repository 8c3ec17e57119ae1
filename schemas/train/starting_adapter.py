"""The keys of `[adapter]` that the config of an adapter decides which training starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.schemas.json_text import read_json_object
from headrace.schemas.outside_text import json_type
from headrace.schemas.train.layer_ranges import parse_layers

CONFIG_NAME = "adapter_config.json"
SAME_KEYS = {  # key of ours -> PEFT's
    "rank": "r",
    "rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
}


def with_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table `[adapter]` with the settings of the adapter that its `path` names.

    Raises:
        ValueError: the table says otherwise, or the adapter cannot be started from.
        DataError: its config cannot be read.
    """
    path = Path(values["path"]) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: not found; give the directory of an adapter that PEFT has written"
        )
    if "init" in values:
        raise ValueError(f'init = "{values["init"]}" has no meaning with path; drop it')
    found = settings_of(read_json_object(path), path)
    for key, value in found.items():
        given = values.get(key, value)
        if key != "dropout" and comparable(key, given) != comparable(key, value):
            raise ValueError(
                f"{key} = {given!r}, but {path} has {value!r}; drop the key, or start from "
                "another adapter"
            )
    return found | dict(values)


def settings_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what an adapter's config says in the words of `[adapter]`.

    Raises:
        ValueError: it is no LoRA adapter, or has a setting of another form.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type {config.get('peft_type')} cannot be started from; LORA alone can"
        )
    found = {ours: config[theirs] for ours, theirs in SAME_KEYS.items() if config.get(theirs)}
    found["kind"] = "dora" if config.get("use_dora") else "lora"
    found.setdefault("rank", 8)  # PEFT's own default, as the next
    found["alpha"] = as_number(config.get("lora_alpha", 8), f"{path}: lora_alpha")
    found["dropout"] = as_number(config.get("lora_dropout") or 0, f"{path}: lora_dropout")
    if patterns := config.get("alpha_pattern"):
        found["alpha_pattern"] = {
            key: as_number(value, f"{path}: alpha_pattern.{key}") for key, value in patterns.items()
        }
    if not config.get("target_modules"):
        found["target_modules"] = []
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        found["layers"] = ",".join(map(str, layers if isinstance(layers, list) else [layers]))
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{path}: layers_pattern = {config['layers_pattern']} is not supported")
    return found


def as_number(value: Any, where: str) -> float:
    """Return a number that JSON may have without a fraction.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {json_type(value)}, not a number; fetch the adapter again")
    return float(value)


def comparable(key: str, value: Any) -> Any:
    """Return a setting as it compares with another way to write the same."""
    if key == "layers" and isinstance(value, str):
        return parse_layers(value)
    if isinstance(value, list):
        return sorted(map(str, value))
    return value
