"""The place of one tensor in a file of weights, and names of such files. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor."""

    path: Path
    dtype: str  # safetensors' name, such as BF16; of GGUF's blocks U8, which they are read as
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int
    blocks: str | None = None  # GGUF's name of the blocks that it is held in
