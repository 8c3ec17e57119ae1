"""Read a model's config.json, and refuse sizes that its weights, or any model, cannot have."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError, HeadraceError
from headrace.schemas.json_text import read_json_object
from headrace.schemas.outside_text import json_type
from headrace.trainer.architecture.model_files import CONFIG_NAME, MAX_CONFIG_BYTES
from headrace.trainer.architecture.weight_index import has_weights, stored_tensors

MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16
MAX_SIZE = (1 << 31) - 1
OBJECTS = ("text_config", "quantization_config", "rope_scaling", "rope_parameters")
LAYERS = re.compile(r"^(n_layers?|num_(hidden_)?layers|num_blocks|n_blocks)$")
EXPERTS = re.compile(r"experts?($|_)")
SIZE = re.compile(
    r"^(?!.*auto_adjust)"  # lfm2's block_auto_adjust_ff_dim is a choice
    r"(vocab_size|.*_dim|.*_rank|.*hidden_size|.*intermediate_size|n_embd|d_model)$"
)
HEADS = re.compile(r"heads?$")
WIDTHS = ("hidden_size", "n_embd", "d_model")
VALUES_A_BYTE = 8  # of weights in one bit


def read_model_config(directory: Path) -> dict[str, Any]:
    """Return config.json of a model directory, its sizes checked.

    Raises:
        ConfigError: it is missing, no object, or names sizes that cannot be.
        DataError: it, or a file of weights, cannot be read.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ConfigError(f"{path}: not found; `model` must be a Hugging Face model directory")
    values = read_json_object(path, MAX_CONFIG_BYTES)
    for key in OBJECTS:
        if values.get(key) is not None and not isinstance(values[key], dict):
            raise ConfigError(f"{path}: {key} is {json_type(values[key])}, not an object")
    stored = stored_values(directory)
    for settings in (values, values.get("text_config") or {}):
        for problem in problems_of(settings, stored):
            raise ConfigError(f"{path}: {problem}; fetch the model again")
    return values


def refuse_scored(directory: Path, name: str = CONFIG_NAME) -> None:
    """Refuse a model, or an adapter of one, that gives a score where one that writes is wanted.

    Args:
        name: of its config, config.json or PEFT's adapter_config.json.

    Raises:
        ConfigError: saying what to do.
    """
    values = read_json_object(directory / name, MAX_CONFIG_BYTES)
    kinds = [*(values.get("architectures") or []), values.get("task_type")]
    if any(str(kind).endswith(("ForSequenceClassification", "SEQ_CLS")) for kind in kinds):
        raise ConfigError(
            f"{directory}: a reward model, which gives a score and writes no text; load it with "
            "transformers' AutoModelForSequenceClassification"
        )


def stored_values(directory: Path) -> tuple[int, int] | None:
    """Return how many tensors a directory's weights have, and how many values; None without any."""
    if not has_weights(directory):
        return None
    tensors = stored_tensors(directory).values()
    return len(tensors), sum(max(prod(t.shape), VALUES_A_BYTE * t.nbytes) for t in tensors)


def problems_of(settings: Mapping[str, Any], stored: tuple[int, int] | None) -> Iterator[str]:
    """Yield sizes that are no numbers, or larger than the weights allow."""
    tensors, values = stored or (MAX_LAYERS, MAX_SIZE)
    for key, value in settings.items():
        limits = limits_of(key, tensors, values)
        if limits is None or value is None or isinstance(value, list | dict):
            if limits is not None and LAYERS.match(key) and value is not None:
                yield f"{key} is {json_type(value)}, not a whole number"
            continue
        if isinstance(value, bool | str) or not float(value).is_integer():
            yield f"{key} = {value!r:.40} is not a whole number"
        elif not 0 <= value <= limits[0]:
            yield f"{key} = {value}, {limits[1]}"
    width = next((settings[key] for key in WIDTHS if isinstance(settings.get(key), int)), 0)
    words = settings.get("vocab_size")
    if stored and isinstance(words, int) and width * words > values:
        yield f"vocab_size = {words} of {width} values, but its weights hold {values:,}"


def limits_of(key: str, tensors: int, values: int) -> tuple[int, str] | None:
    """Return the largest value of a setting, and why; None where it is no size."""
    if LAYERS.match(key):
        return min(MAX_LAYERS, tensors), f"but its weights have {tensors:,} tensors"
    if EXPERTS.search(key) and key.startswith(("num", "n_")):
        return min(MAX_EXPERTS, values), f"at most {MAX_EXPERTS:,} are read"
    if SIZE.match(key) or (HEADS.search(key) and key.startswith(("num", "n_"))):
        return min(MAX_SIZE, values), f"but its weights hold {values:,} values"
    if key.endswith("position_embeddings"):
        return MAX_SIZE, "more than any model has"
    return None


@contextmanager
def transformers_reads(path: Path | str) -> Iterator[None]:
    """Turn what transformers raises over a model's files into one line that names them.

    Raises:
        ConfigError: with the first line of its reason.
    """
    try:
        yield
    except HeadraceError:
        raise
    except (Exception, RecursionError) as error:  # noqa: BLE001 (files from outside: any kind)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{path}: transformers cannot read it ({' '.join(lines[:2])[:300]})"
        ) from None
