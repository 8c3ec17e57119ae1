"""A weight that a checkpoint holds quantized, and what all formats of such checkpoints share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.settings import REMEDY

Parts = Mapping[str, Tensor]  # what each tensor is -> the tensor


@dataclass(frozen=True)
class StoredWeight:
    """The tensors of a checkpoint that are one weight together.

    Attributes:
        parts: what each is, in the format's own terms -> its name in the files.
        dequantize: returns the weight in a type, on the device where its parts are.
    """

    parts: Mapping[str, str]
    dequantize: Callable[[Parts, torch.dtype], Tensor]


class StoredFormat(ABC):
    """A way in which checkpoints hold quantized weights.

    Args:
        settings: `quantization_config` of config.json.
        path: of the model, for messages.

    Raises:
        ConfigError: a variant of the format that is not read.
    """

    def __init__(self, settings: Mapping[str, Any], path: str) -> None:
        self.settings = settings
        self.path = path

    @abstractmethod
    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return the quantized weights among a checkpoint's tensors, by the names that they would
        have in a checkpoint that is not quantized.
        """

    def refusal(self, what: str) -> ConfigError:
        """Return the error for a variant that is not read."""
        return ConfigError(f"{self.path}: its weights are quantized already, {what}; {REMEDY}")
