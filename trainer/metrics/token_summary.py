"""Statistics of the trained tokens of a step or evaluation, from one value of each token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.trainer.metrics.histogram import Histogram

Values = NDArray[np.float32]

QUANTILES = (
    *("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"),
    *("0.95", "0.96", "0.97", "0.98", "0.99", "0.999"),
)
LARGEST_EXPONENT = 700
SMALLEST_LOSS = 1e-10  # below it, where certain tokens are, the logarithm shows nothing


@dataclass(frozen=True)
class TokenSample:
    """The trained tokens of one replica, each array [tokens]. Of pairs: of the chosen answers."""

    losses: Values  # cross-entropy, in nats
    entropies: Values  # of the predicted distribution, in nats
    ranks: Values  # logits larger than the label's
    hidden_norms: Values  # of the state that the head is given
    vocabulary: int


@dataclass(frozen=True)
class TokenSummary:
    """Means are over trained tokens, entropies in nats."""

    entropy: float
    normalized_entropy: float  # over that of an even distribution, log(vocabulary)
    likelihood: float  # mean probability of the labels
    perplexity: float  # exp of the mean cross-entropy
    pseudo_r2: float  # McFadden's: 1 - mean cross-entropy / log(vocabulary)
    top1_accuracy: float
    top5_accuracy: float
    top20_accuracy: float
    hidden_norm: float
    loss_quantiles: dict[str, float]
    entropy_quantiles: dict[str, float]
    log_loss_histogram: Histogram
    hidden_norm_histogram: Histogram

    def curves(self) -> dict[str, float]:
        """The means by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}

    def histograms(self) -> dict[str, Histogram]:
        """Return the histograms by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Histogram)}


def summarize(samples: Sequence[TokenSample]) -> TokenSummary | None:
    """Over all replicas; None without trained tokens. The order of tokens does not matter.

    Source: D. McFadden, Conditional logit analysis of qualitative choice behavior, 1974.
    """
    if not sum(sample.losses.size for sample in samples):
        return None
    even = math.log(samples[0].vocabulary)
    losses, entropies, ranks, hidden_norms = (
        np.concatenate([getattr(sample, name) for sample in samples]).astype(np.float64)
        for name in ("losses", "entropies", "ranks", "hidden_norms")
    )
    loss, entropy = mean(losses), mean(entropies)
    return TokenSummary(
        entropy=entropy,
        normalized_entropy=entropy / even,
        likelihood=mean(np.exp(-losses)),
        perplexity=math.inf if loss > LARGEST_EXPONENT else math.exp(loss),
        pseudo_r2=1 - loss / even,
        top1_accuracy=mean(ranks < 1),
        top5_accuracy=mean(ranks < 5),
        top20_accuracy=mean(ranks < 20),
        hidden_norm=mean(hidden_norms),
        loss_quantiles=quantiles(losses),
        entropy_quantiles=quantiles(entropies),
        log_loss_histogram=Histogram.of(np.log(np.maximum(losses, SMALLEST_LOSS))),
        hidden_norm_histogram=Histogram.of(hidden_norms),
    )


def mean(values: NDArray[Any]) -> float:
    """Added with one rounding."""
    return math.fsum(values.tolist()) / values.size


def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Between neighbors, linearly."""
    found = np.quantile(values, [float(name) for name in QUANTILES])
    return dict(zip(QUANTILES, found.tolist(), strict=True))
