"""Anomalies of steps."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Anomaly:
    """Problem of a step, and the policy that decides what follows."""

    what: str
    policy: Literal["continue", "skip", "stop"]

    @property
    def forbids_update(self) -> bool:
        """Return whether the weights stay as they are."""
        return self.policy != "continue"
