"""The keys of `[adapter]` that the config of an adapter decides which training starts from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headrace.schemas.outside_text import OutsideTextError, json_type, parse_json, read_bytes

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


def with_start(
    values: Mapping[str, Any], parse_layers: Callable[[str], list[int]]
) -> dict[str, Any]:
    """Return a table `[adapter]` with the settings of the adapter that its `path` names.

    Raises:
        ValueError: the table says otherwise, the adapter cannot be started from, or its config
            cannot be read.
    """
    path = Path(values["path"]) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: not found; give the directory of an adapter that PEFT has written"
        )
    if "init" in values:
        raise ValueError(f'init = "{values["init"]}" has no meaning with path; drop it')
    found = settings_of(read_settings(path), path)
    for key, value in found.items():
        given = values.get(key, value)
        if key == "layers" and isinstance(given, str):
            same = parse_layers(given) == parse_layers(value)
        else:
            same = key == "dropout" or in_order(given) == in_order(value)
        if not same:
            raise ValueError(
                f"{key} = {given!r}, but {path} has {value!r}; drop the key, or start from "
                "another adapter"
            )
    return found | dict(values)


def read_settings(path: Path) -> dict[str, Any]:
    """Return what an adapter's config holds.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        config = parse_json(read_bytes(path))
    except OutsideTextError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {json_type(config)}, where an object is expected")
    return config


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
    if (tokens := config.get("trainable_token_indices")) is not None:
        found["trainable_token_indices"] = tokens_of(tokens, path)
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        found["layers"] = ",".join(map(str, layers if isinstance(layers, list) else [layers]))
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{path}: layers_pattern = {config['layers_pattern']} is not supported")
    return found


def tokens_of(value: Any, path: Path) -> Any:
    """Return the ids of tokens whose rows are trained, which PEFT may have by module.

    Raises:
        ValueError: they differ by module.
    """
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if any(found != lists[0] for found in lists):
        raise ValueError(f"{path}: trainable_token_indices differ by module, which is unsupported")
    return sorted(lists[0]) if lists and isinstance(lists[0], list) else value


def as_number(value: Any, where: str) -> float:
    """Return a number that JSON may have without a fraction.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {json_type(value)}, not a number; fetch the adapter again")
    return float(value)


def in_order(value: Any) -> Any:
    """Return a setting, a list in an order of its own."""
    return sorted(map(str, value)) if isinstance(value, list) else value
