"""The outcome of a step: the norm of its gradient, and what was wrong with it."""

from dataclasses import dataclass
from typing import Literal

from headrace.trainer.run.regularizers import ProductNorms


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step, and what follows."""

    what: str
    policy: Literal["continue", "skip", "stop"]


@dataclass(frozen=True)
class Outcome:
    """How a step ended: the gradient's norm before clipping, and what was wrong, if anything."""

    norm: float
    anomaly: Anomaly | None
    norms: ProductNorms | None = None  # of adapters, where they are limited

    @property
    def is_taken(self) -> bool:
        """Whether the weights are updated."""
        return self.anomaly is None or self.anomaly.policy == "continue"
