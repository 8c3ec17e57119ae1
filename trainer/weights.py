"""Reads a Hugging Face model directory's weights tensor by tensor, only what is asked for."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.schemas.errors import DataError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class WeightFiles:
    """Tensors by name from `model.safetensors`, or from the shards that its index lists.

    Use as a context manager; a file is opened when its first tensor is read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return weight_map
        if (self.directory / SINGLE_NAME).is_file():
            return dict.fromkeys(self._file(SINGLE_NAME).keys(), SINGLE_NAME)
        raise DataError(
            f"{self.directory}: no {SINGLE_NAME} and no {INDEX_NAME}; is this a model directory?"
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); fetch the model again"
                ) from None
        return self._open[name]

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """One tensor, in the type it is stored in.

        Raises:
            DataError: the checkpoint lacks it, or has it in another shape than config.json says.
        """
        if name not in self._file_of:
            raise DataError(
                f"{self.directory}: the checkpoint has no tensor {name}, "
                "which config.json calls for"
            )
        tensor: Tensor = self._file(self._file_of[name]).get_tensor(name)
        if tensor.shape != shape:
            raise DataError(
                f"{self.directory / self._file_of[name]}: {name} has shape {list(tensor.shape)}, "
                f"config.json says {list(shape)}"
            )
        return tensor
