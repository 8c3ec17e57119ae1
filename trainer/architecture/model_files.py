"""Files of a model directory by name, and tensors by their place in them. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PosixPath

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"


class PickledDirectory(PosixPath):
    """A model directory whose pickles may be read, since the config says so."""


@dataclass(frozen=True)
class Slice:
    """Some of the rows of a tensor, or of its columns."""

    dim: int
    start: int
    stop: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the slice of a tensor."""
        return tuple(
            self.stop - self.start if dim == self.dim else n for dim, n in enumerate(whole)
        )


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor."""

    path: Path
    dtype: str  # safetensors' name, such as BF16; of GGUF's blocks U8
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int
    blocks: str | None = None  # GGUF's name of the blocks that it is held in
