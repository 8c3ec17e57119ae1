"""The record of an optimizer: its class, its states and their size, and what it requires."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# values of a weight's state before the first step: zeros or a copy of the weight; a step count as a
# number, in host memory, or beside the weight; a row's or column's numbers of a matrix, as such or
# without the other dimension
Fresh = Literal[
    "zeros",
    "copy",
    "number",
    "count",
    "count_on_device",
    "rows",
    "columns",
    "rows_flat",
    "columns_flat",
]
# weights that have a state: all, by their dimensions, with momentum, orthogonalized or not
Holder = Literal["all", "matrix", "vector", "moving", "orthogonal", "other"]


OF_A_WEIGHT = ("zeros", "copy")


@dataclass(frozen=True)
class State:
    """One state that an optimizer keeps: its value before the first step, and for which weights."""

    fresh: Fresh
    of: Holder = "all"


@dataclass(frozen=True)
class OptimizerRecord:
    """One optimizer.

    Attributes:
        description: for the config reference.
        factory: its class, as `module:name`.
        arguments: names of its arguments, of those that `build_optimizer` knows.
        states: states of a weight by name. None: the class makes them itself (`init_state`).
        constants: further arguments.
        group_numbers: numbers of a parameter group that checkpoints hold too.
        requirement: what pip installs for it, beside torch.
        cpu_substitute: the type to use on a CPU, where this one cannot run.
        states_size: numbers of all states for each weight, where `states` does not tell.
        decays: applies weight decay.
        momentum: its usual momentum; None: it has no such number.
        orthogonalizes: steps hidden matrices by another rule than all else.
        averages: trains weights at one point and uses them at another, their average.
        keeps_dtype: trained weights stay in the type of the computation, instead of float32.
        elementwise: steps each entry by itself, so that a weight may be cut anywhere to shard it.
        prunable: states that a restart may set to 0 in part.
    """

    description: str
    factory: str
    arguments: tuple[str, ...]
    states: Mapping[str, State] | None
    constants: Mapping[str, object] = field(default_factory=dict)
    group_numbers: tuple[str, ...] = ()
    requirement: str | None = None
    cpu_substitute: str | None = None
    states_size: float | None = None
    decays: bool = True
    momentum: float | None = None
    orthogonalizes: bool = False
    averages: bool = False
    keeps_dtype: bool = False
    elementwise: bool = True
    prunable: tuple[str, ...] = ()

    @property
    def shardable(self) -> bool:
        """Return whether the states of a weight can be shared out among ranks."""
        return self.elementwise and self.states is not None

    @property
    def library(self) -> str:
        """Return the package that its class comes from."""
        return self.factory.partition(":")[0].partition(".")[0]

    @property
    def droppable(self) -> bool:
        """Return whether weights are of use without the states."""
        return not self.averages

    def state_numbers(self, weights: int, matrices: int, momentum: float) -> float:
        """Return the numbers that its states hold, in the trained weights' type; small ones apart.

        Args:
            weights: trained in all.
            matrices: those of them in hidden matrices.
            momentum: as the config has it.
        """
        if self.states is None:
            assert self.states_size is not None
            return self.states_size * weights
        held: dict[Holder, int] = {
            "all": weights,
            "moving": weights if momentum else 0,
            "orthogonal": matrices,
            "other": weights - matrices,
        }
        whole = [state for state in self.states.values() if state.fresh in OF_A_WEIGHT]
        return float(sum(held.get(state.of, 0) for state in whole))
