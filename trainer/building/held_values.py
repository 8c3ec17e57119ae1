"""The initial values of buffers, and the types of all tensors, as transformers itself has them."""

import copy
import math
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.weight_names import kept_in_float32

LARGE = 1 << 24  # numbers; no buffer has so many
CREATORS = (torch.empty, torch.zeros, torch.ones)


def lay_out_with_buffers(architecture: Architecture, dtype: torch.dtype) -> nn.Module:
    """Return the whole model with weights on the meta device and buffers on the CPU.

    Buffers hold what each module's constructor and the model's own initialization give them;
    all have the types that transformers gives them when it loads in `dtype`.
    """
    config = copy.deepcopy(architecture.model_config)  # which is given the type otherwise
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        model: nn.Module = architecture.model_class.from_config(
            config, attn_implementation=architecture.attention, dtype=dtype
        )
    return model


def trained_dtype(config: OptimizerConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the type of trained weights, given that of the computation."""
    return dtype if config.record.keeps_dtype else torch.float32


class HeldTypes:
    """The types of a model's weights and buffers when transformers loads it in `dtype`.

    Args:
        model: as `lay_out_with_buffers` makes it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._in_float32 = kept_in_float32(model, dtype)
        named = [*model.named_parameters(), *model.named_buffers()]
        self._own = {name: value.dtype for name, value in named if value.dtype != dtype}

    def of(self, name: str) -> torch.dtype:
        """Return the type of a weight or buffer, by its name in the model without adapters."""
        return torch.float32 if self._in_float32(name) else self._own.get(name, self.dtype)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device at once, since they are weights and dropped there."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in CREATORS and kwargs.get("device") is None and _count(args) >= LARGE:
            kwargs["device"] = "meta"
        made: Tensor = func(*args, **kwargs)
        return made


def _count(shape: Any) -> int:
    """Return how many numbers a tensor of this shape has; the shape may be given in either form."""
    numbers = shape[0] if shape and isinstance(shape[0], list | tuple) else shape
    return math.prod(number for number in numbers if isinstance(number, int))
