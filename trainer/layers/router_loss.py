"""The auxiliary loss of mixtures of experts, which keeps routers from favoring a few experts.

Switch Transformers, https://huggingface.co/papers/2101.03961, equations 4 to 6, layer by layer, and
the mean over layers. transformers multiplies shares that it has pooled over all layers; that needs
the last stage's counts before the first stage's backward pass, and lets layers balance each other
out. For one layer the two are the same.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.trainer.architecture.router import Router
from headrace.trainer.layers.device import to_device
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice

# PEFT keeps a module that is trained in full beside its frozen original, which does not run
REPLACED = re.compile(r"(^|\.)original_module(\.|$)")


@dataclass(frozen=True)
class RouterLossSettings:
    """Weights with which the loss of each layer enters the whole."""

    router: Router
    coefficient: float  # of the mean over layers, beside the loss of the tokens
    layers: int  # with a router, in the whole model
    top_k: int  # experts that each token is sent to

    @property
    def weight(self) -> float:
        """Return the factor of one layer's loss."""
        return self.coefficient / self.layers


class RouterTap:
    """Holds the logits of a decoder layer's router from its last forward pass."""

    def __init__(self, layer: nn.Module, router: Router) -> None:
        self.index = router.output_index
        self.logits: Tensor | None = None
        routers = [
            part
            for name, part in layer.named_modules()
            if isinstance(part, router.module_type) and not REPLACED.search(name)
        ]
        assert len(routers) == 1, "one router a layer"
        routers[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.logits = output[self.index] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """The logits, [tokens, experts]; given once, so that nothing is kept alive."""
        logits, self.logits = self.logits, None
        assert logits is not None, "the layer's router did not run"
        return logits


def count_routers(layers: nn.Module, router: Router) -> int:
    """Layers with a router."""
    return sum(
        any(isinstance(part, router.module_type) for part in layer.modules())
        for layer in layers.children()
    )


def tap_router(layer: nn.Module, settings: RouterLossSettings | None) -> RouterTap | None:
    """A tap on the layer's router, if it has one whose loss is wanted."""
    if settings is None:
        return None
    has_one = any(isinstance(part, settings.router.module_type) for part in layer.modules())
    return RouterTap(layer, settings.router) if has_one else None


def real_tokens(row_lengths: list[int], places: int, device: torch.device) -> Tensor:
    """[b, s] bool: false for padding.

    Args:
        row_lengths: [b] tokens of each row, padding left out.
        places: s.
    """
    ends = torch.tensor(row_lengths).unsqueeze(1)
    return to_device(torch.arange(places) < ends, device)


def total_loss(
    losses: list[Tensor], settings: RouterLossSettings | None, scale: float
) -> Tensor | None:
    """A stage's part of the routers' loss, from its layers' own; None without any."""
    if not losses:
        return None
    assert settings is not None
    return torch.stack(losses).sum() * (settings.weight * scale)


def balance_parts(logits: Tensor, top_k: int, real: Tensor, tokens: int) -> Tensor:
    """[2, experts] float32: share of the tokens sent to each expert, and its mean probability.

    Those of some of a micro-batch's tokens are a part of both, which add up to those of all.

    Args:
        logits: [tokens here, experts].
        real: [tokens here] bool, false for padding.
        tokens: of the micro-batch's whole rows, padding left out.
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    weight = real.float() / torch.full((), max(1, tokens), device=real.device)
    chosen = torch.topk(probabilities.detach(), top_k, dim=-1).indices
    sent = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
    # `weight @ sent` would reshape in place a product that selective recomputation keeps
    return torch.stack([torch.mv(part.t(), weight) for part in (sent, probabilities)])


def balance_loss(parts: Tensor, sequence: SequenceSlice = WHOLE) -> Tensor:
    """experts * sum over experts of (share of the tokens sent to it) * (mean probability of it).

    Where ranks share rows, both are of whole rows, and the ranks' losses add up to that of all.

    Args:
        parts: see `balance_parts`.
        sequence: the slice of every row that they are of.

    Returns:
        A float32 scalar: `top_k` where all experts are used alike, else more; 0 without tokens.
    """
    shares, means = parts.unbind()
    return parts.shape[-1] * (sequence.add(shares.detach()) * means).sum()
