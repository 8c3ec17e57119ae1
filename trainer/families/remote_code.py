"""Models whose code lies in their own directory: run only where the config asks for it.

`auto_map` of config.json names the classes. Once transformers knows them, the model is laid out,
tried and trained as any other. Read against transformers 5.23.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from headrace.schemas.errors import ConfigError
from headrace.schemas.json_text import read_json_object

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 16 << 20
CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"
MEANING = (
    "its code lies in its directory (auto_map in config.json), and would be run with all that you "
    "may do on this machine; read it, and if you trust it, set trust_remote_code = true"
)


def has_code(directory: Path) -> bool:
    """Return whether config.json names classes of code in the model's directory."""
    return bool(references(directory))


def references(directory: Path) -> dict[str, str]:
    """Return which class is which, as `module.Class`; empty where config.json names none."""
    path = directory / "config.json"
    found = read_json_object(path, MAX_CONFIG_BYTES).get("auto_map") if path.is_file() else None
    return dict(found) if isinstance(found, dict) else {}


def run_code_of(directory: Path) -> None:
    """Run the code in a model's directory, and let transformers know its classes.

    Raises:
        ConfigError: there is none, it is elsewhere, or it fails.
    """
    found = references(directory)
    missing = [part for part in (CONFIG, MODEL) if not isinstance(found.get(part), str)]
    if missing:
        raise ConfigError(
            f"trust_remote_code: auto_map in {directory / 'config.json'} names no "
            f"{' and no '.join(missing)}; drop the key"
        )
    for part in (CONFIG, MODEL):
        check_place(directory, found[part])
    try:
        kinds = [class_of(directory, found[part]) for part in (CONFIG, MODEL)]
    except Exception as error:  # noqa: BLE001 (code from outside: any kind)
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ConfigError(
            f"{directory}: its code cannot be run with the installed transformers "
            f"({type(error).__name__}: {reason}); convert the model to a type that transformers has"
        ) from None
    register(directory, *kinds)


def check_place(directory: Path, reference: str) -> None:
    """Check that a class's module lies beside config.json.

    Raises:
        ConfigError: it lies in another repository, or is missing.
    """
    module = reference.rpartition(".")[0]
    if "--" in reference or not (directory / f"{module}.py").is_file():
        raise ConfigError(
            f"trust_remote_code: {reference} is not in {directory}; fetch the whole repository, "
            "and those that it names, into that directory"
        )


def class_of(directory: Path, reference: str) -> Any:
    """Return a class of code in a directory."""
    return get_class_from_dynamic_module(reference, str(directory), local_files_only=True)


def register(directory: Path, config: Any, model: Any) -> None:
    """Let transformers find a model's classes by its type.

    Raises:
        ConfigError: the type is one of transformers' own.
    """
    known = CONFIG_MAPPING.get(config.model_type)
    if known is not None and known.__module__.startswith("transformers.models."):
        raise ConfigError(
            f"trust_remote_code: transformers has code of its own for model_type "
            f'"{config.model_type}", which is used; drop the key'
        )
    logger.info("warning: %s: running its own code (trust_remote_code)", directory)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
