"""Counts of values in even bins, as TensorBoard shows them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width between `low` and `high`."""

    low: float
    high: float
    counts: list[int]

    @classmethod
    def of(cls, values: ArrayLike) -> "Histogram":
        """Count the finite values."""
        values = np.asarray(values)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=BINS)
        return cls(float(edges[0]), float(edges[-1]), counts.tolist())

    def as_tensorboard(self) -> dict[str, Any]:
        """Return arguments of `add_histogram_raw`; its sums are of the bins' centers."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        centers, counts = (edges[1:] + edges[:-1]) / 2, np.asarray(self.counts)
        return {
            "min": self.low,
            "max": self.high,
            "num": int(counts.sum()),
            "sum": float(centers @ counts),
            "sum_squares": float(centers**2 @ counts),
            "bucket_limits": edges[1:].tolist(),
            "bucket_counts": self.counts,
        }
