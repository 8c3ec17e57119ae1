"""The outcome of a step: the norm of its gradient, and what was wrong with it."""

from dataclasses import dataclass
from typing import Literal

from headrace.trainer.run.regularizers import ProductNorms


@dataclass(frozen=True)
class Anomaly:
    """Problem of a step, and the policy that decides what follows."""

    what: str
    policy: Literal["continue", "skip", "stop"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step: the gradient's norm before clipping, and an anomaly, if any."""

    norm: float
    anomaly: Anomaly | None
    norms: ProductNorms | None = None  # of adapters, where they are limited

    @property
    def is_taken(self) -> bool:
        """Return whether the weights are updated."""
        return self.anomaly is None or self.anomaly.policy == "continue"
