"""This machine, and how a model fits it."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Machine:
    """The GPUs of this machine; none: it trains on its processors."""

    gpus: int = 0
    memory: int = 0  # bytes of the smallest
    name: str = ""

    def describe(self) -> str:
        """Return the machine in a few words."""
        if not self.gpus:
            return "no GPU: training runs on the processors, and slowly"
        return f"{self.gpus} x {self.name} with {self.memory / 2**30:.0f} GiB each"


@dataclass(frozen=True)
class Fit:
    """Keys with which a model trains here, those of the optimizer with a dot, and how full the
    fullest GPU will be (bytes).
    """

    stages: int
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    peak: float | None = None
    fits: bool = True
    replicas: int = 1

    def with_changes(self, changes: dict[str, Any]) -> "Fit":
        """Return the same layout with these keys before its own."""
        return replace(self, changes={**changes, **self.changes})


def this_machine() -> Machine:
    """Return what is there to train on."""
    from headrace.trainer.devices import count_accelerators, smallest_memory

    count = count_accelerators()
    if not count:
        return Machine()
    return Machine(count, *smallest_memory())
