"""Regularizers of adapters after each step, by way of r x r products alone.

For W = BA the two Gram matrices G = B^T B and H = A A^T, both [r, r], say all that is needed: the
gradient of |W|^2 / 2 is G A for A and B H for B, and |W|^2 = trace(G H). W itself, of the size of
the weight that it is added to, is never formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.schemas.train.optimizer_config import RegularizationConfig
from headrace.trainer.adapters.names import ADAPTER, lora_layers

DOWN_TO_UP = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))


@dataclass(frozen=True)
class Pair:
    """The two matrices of an adapter: A [r, inputs], B [outputs, r]; `scale` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def grams(self) -> tuple[Tensor, Tensor]:
        """B^T B and A A^T."""
        return self.up.T @ self.up, self.down @ self.down.T


@dataclass(frozen=True)
class ProductNorms:
    """Frobenius norms of what adapters add to their weights, before they are limited."""

    norms: list[float]
    scaled: int | None = None  # how many were too large, where they are limited


def find_pairs(modules: dict[str, nn.Module]) -> list[Pair]:
    """The adapters below named modules, in order."""
    pairs = []
    for _, layer in lora_layers(modules):
        if ADAPTER in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        else:
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        pairs.append(Pair(down, up, layer.scaling[ADAPTER]))
    return pairs


@torch.no_grad()
def regularize(
    config: RegularizationConfig, pairs: Sequence[Pair], rate: float
) -> ProductNorms | None:
    """Decay and limit adapters after an optimizer step.

    Args:
        rate: the learning rate of that step.

    Returns:
        The norms, if they are limited.
    """
    if config.product_decay:
        for pair in pairs:
            decay_product(pair, rate * config.product_decay)
    if config.max_product_norm is None:
        return None
    norms, scaled = measure(pairs).norms, 0
    for pair, norm in zip(pairs, norms, strict=True):
        if norm > config.max_product_norm:
            limit_norm(pair, config.max_product_norm / norm)
            scaled += 1
    return ProductNorms(norms, scaled)


@torch.no_grad()
def measure(pairs: Sequence[Pair]) -> ProductNorms:
    """Return the norms of what adapters add."""
    return ProductNorms(
        torch.stack([product_norm(pair) for pair in pairs]).tolist() if pairs else []
    )


def decay_product(pair: Pair, amount: float) -> None:
    """One step of gradient descent on |BA|^2 / 2 for both matrices at once."""
    up_gram, down_gram = pair.grams()
    down_change, up_change = up_gram @ pair.down, pair.up @ down_gram
    pair.down.sub_(down_change, alpha=amount)
    pair.up.sub_(up_change, alpha=amount)


def product_norm(pair: Pair) -> Tensor:
    """The Frobenius norm of scale * BA, a scalar."""
    up_gram, down_gram = pair.grams()
    return abs(pair.scale) * (up_gram * down_gram).sum().clamp(min=0).sqrt()


def limit_norm(pair: Pair, factor: float) -> None:
    """Scale the product by a factor below 1, half of it in each matrix."""
    pair.down.mul_(math.sqrt(factor))
    pair.up.mul_(math.sqrt(factor))
