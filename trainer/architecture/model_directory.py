"""Lookup of the directory that holds a model, by the model's name."""

import re
from functools import partial
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.model_files import PickledDirectory

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
PICKLED = "pickled"


def model_directory(name: str, weights: str = "stored") -> Path:
    """The directory itself, or the local copy of a model of the Hugging Face hub.

    A hub id such as `HuggingFaceTB/SmolLM2-135M`, with `@revision` if wished, is fetched once and
    found in the hub's cache from then on, without a network.

    Raises:
        ConfigError: neither a directory nor a model that can be had.
    """
    kind = PickledDirectory if weights == PICKLED else Path
    path = kind(name)
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name}: no such directory; set `model` to a Hugging Face model directory"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise ConfigError(
            f"{name}: no such directory; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    repository, _, revision = name.partition("@")
    files = [*FILES, "*.bin"] if weights == PICKLED else FILES
    fetch = partial(snapshot_download, repository, revision=revision or None, allow_patterns=files)
    try:
        return kind(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return kind(fetch())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{name}: no such directory, and it cannot be fetched from the hub ({reason}); "
            "set `model` to a Hugging Face model directory, or look at the name and the network"
        ) from None
