"""The optimizers of `[optimizer]`, one record each, with all that other code asks of one.

A record names its class in text, so that a config is read without torch and without the class's
library. To add an optimizer, add a record here; `headrace.trainer` does the rest from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# values of a weight's state before the first step: zeros or a copy of the weight; a step count in
# host memory or beside the weight; a row's or column's numbers of matrices; zeros of vectors alone
FreshState = Literal["zeros", "copy", "count", "count_on_device", "rows", "columns", "vector"]
ADAM: dict[str, FreshState] = {"exp_avg": "zeros", "exp_avg_sq": "zeros"}
ADAM_ARGUMENTS = ("lr", "betas", "eps")
OF_A_WEIGHT = ("zeros", "copy")
# entries of weights whose states come to the device together, where they lie in host memory
OFFLOAD_BUCKET = 1 << 26
OFFLOAD_BUCKETS = 3  # on the device at once: one steps, one comes, one goes


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
        averages: trains weights at one point and uses them at another, their average.
        keeps_dtype: trained weights stay in the type of the computation, instead of float32.
        elementwise: steps each entry by itself, so that a weight may be cut anywhere to shard it.
        prunable: states that a restart may set to 0 in part.
    """

    description: str
    factory: str
    arguments: tuple[str, ...]
    states: Mapping[str, FreshState] | None
    constants: Mapping[str, object] = field(default_factory=dict)
    group_numbers: tuple[str, ...] = ()
    requirement: str | None = None
    cpu_substitute: str | None = None
    states_size: float | None = None
    decays: bool = True
    averages: bool = False
    keeps_dtype: bool = False
    elementwise: bool = True
    prunable: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """Return the package that its class comes from."""
        return self.factory.partition(":")[0].partition(".")[0]

    @property
    def droppable(self) -> bool:
        """Return whether weights are of use without the states."""
        return not self.averages

    @property
    def numbers_per_weight(self) -> float:
        """Return the numbers that its states hold of each weight, in the trained weights' type."""
        if self.states is None:
            assert self.states_size is not None
            return self.states_size
        return sum(fresh in OF_A_WEIGHT for fresh in self.states.values())


BITSANDBYTES = "bitsandbytes>=0.48"
EIGHT_BITS = 2 * 8 / 32  # two moments, in units of float32

OPTIMIZERS: dict[str, OptimizerRecord] = {
    "adamw": OptimizerRecord(
        "trained weights, gradients and states in float32",
        "torch.optim:AdamW",
        ADAM_ARGUMENTS,
        {"step": "count_on_device", **ADAM},
        constants={"fused": True},
        prunable=("exp_avg", "exp_avg_sq"),
    ),
    "adamw_kahan": OptimizerRecord(
        "all in `dtype`, with Kahan summation; 10 bytes a weight in bfloat16 instead of 16",
        "headrace.trainer.optim.adamw_kahan:AdamWKahan",
        (*ADAM_ARGUMENTS, "triton"),
        {"step": "count", **ADAM, "compensation": "zeros"},
        keeps_dtype=True,
    ),
    "adamw_8bit": OptimizerRecord(
        "bitsandbytes, states in 8 bits",
        "bitsandbytes.optim:AdamW8bit",
        ADAM_ARGUMENTS,
        None,
        requirement=BITSANDBYTES,
        states_size=EIGHT_BITS,
        elementwise=False,
    ),
    "adamw_8bit_paged": OptimizerRecord(
        "the same, in memory that may be paged out to the host",
        "bitsandbytes.optim:PagedAdamW8bit",
        ADAM_ARGUMENTS,
        None,
        requirement=BITSANDBYTES,
        cpu_substitute="adamw_8bit",
        states_size=EIGHT_BITS,
        elementwise=False,
    ),
    "adam": OptimizerRecord(
        "no decay",
        "torch.optim:Adam",
        ADAM_ARGUMENTS,
        {"step": "count_on_device", **ADAM},
        constants={"fused": True},
        decays=False,
        prunable=("exp_avg", "exp_avg_sq"),
    ),
    "lion": OptimizerRecord(
        "one state; wants a learning rate some ten times lower",
        "lion_pytorch:Lion",
        ("lr", "betas"),
        {"exp_avg": "zeros"},
        requirement="lion-pytorch>=0.2.2",
        prunable=("exp_avg",),
    ),
    "adafactor": OptimizerRecord(
        "states of rows and columns; `beta1`, `beta2` and `eps` have no effect",
        "torch.optim:Adafactor",
        ("lr",),
        {"step": "count", "variance": "vector", "row_var": "rows", "col_var": "columns"},
        elementwise=False,
    ),
    "adamw_schedule_free": OptimizerRecord(
        "averages weights in place of a falling learning rate; evaluated, saved and exported are "
        "the averages",
        "schedulefree:AdamWScheduleFree",
        ADAM_ARGUMENTS,
        {"z": "copy", "exp_avg_sq": "zeros"},
        group_numbers=("k", "lr_max", "weight_sum"),
        requirement="schedulefree>=1.4",
        averages=True,
    ),
}
DESCRIPTION = " ".join(f'`"{name}"`: {record.description}.' for name, record in OPTIMIZERS.items())
