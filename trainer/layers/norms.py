"""RMSNorm by our kernel in the place of transformers' modules. Read against transformers 5.23."""

from typing import Any

from torch import Tensor, nn

from headrace.kernels.rms_norm import rms_norm

# What transformers' classes compute, by name: the settings of `rms_norm`. Llama's way where nothing
# else stands here.
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "Gemma2RMSNorm": {"offset": 1.0, "rounds_first": False},
    "Gemma3RMSNorm": {"offset": 1.0, "rounds_first": False},
    "Olmo2RMSNorm": {"rounds_first": False},
}
LLAMA_KIND = "Granite Llama Mistral Mixtral Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SmolLM3".split()
KINDS = {f"{family}RMSNorm": dict[str, Any]() for family in LLAMA_KIND} | OTHER_KINDS


class RmsNorm(nn.Module):
    """A norm's weight under its name, applied in one pass on a GPU."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        source: Any = norm
        self.weight = source.weight
        self.eps = source.eps if hasattr(source, "eps") else source.variance_epsilon
        self.settings = KINDS[type(norm).__name__]

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps, triton=hidden.is_cuda, **self.settings)


def faster_norm(norm: nn.Module) -> nn.Module:
    """The same norm by our kernel, over the same weight; others as they are."""
    return RmsNorm(norm) if type(norm).__name__ in KINDS else norm


def swap_norms(layer: nn.Module) -> None:
    """Put `faster_norm` in the place of each norm of a layer."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in KINDS:
                setattr(parent, name, RmsNorm(child))
