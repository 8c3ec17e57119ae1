"""Files of a model directory by name, and tensors by their place in them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor."""

    path: Path
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int
