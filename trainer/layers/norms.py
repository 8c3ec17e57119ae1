"""RMSNorm by our kernel in the place of transformers' modules. Read against transformers 5.23."""

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from headrace.kernels.on_accelerator import on_accelerator
from headrace.kernels.rms_norm import rms_norm
from headrace.trainer.architecture.families import NormKind


class RmsNorm(nn.Module):
    """A norm's weight under its name, applied in one pass on a GPU."""

    def __init__(self, norm: nn.Module, kind: NormKind) -> None:
        super().__init__()
        source: Any = norm
        self.weight = source.weight
        self.eps = source.eps if hasattr(source, "eps") else source.variance_epsilon
        self.settings = asdict(kind)

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(
            hidden,
            self.weight,
            self.eps,
            triton=on_accelerator(hidden),
            **self.settings,
        )


def faster_norm(norm: nn.Module, kind: NormKind | None) -> nn.Module:
    """The same norm by our kernel, over the same weight; norms of another kind as they are."""
    return norm if kind is None or not is_rms_norm(norm) else RmsNorm(norm, kind)


def swap_norms(layer: nn.Module, kind: NormKind | None) -> None:
    """Put `faster_norm` in the place of each norm of a layer."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if kind is not None and is_rms_norm(child):
                setattr(parent, name, RmsNorm(child, kind))


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' classes of this norm."""
    return type(module).__name__.endswith("RMSNorm")
