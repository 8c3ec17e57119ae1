"""The optimizers of `[optimizer]`, one record each, with all that other code asks of one.

A record names its class in text, so that a config is read without torch and without the class's
library. To add an optimizer, add a record here; `headrace.trainer` does the rest from it.
"""

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


ZEROS = State("zeros")
COUNT = State("count")
ON_DEVICE = State("count_on_device")
ADAM = {"exp_avg": ZEROS, "exp_avg_sq": ZEROS}
ADAM_ARGUMENTS = ("lr", "betas", "eps")
# entries of weights whose states come to the device together, where they lie in host memory
OFFLOAD_BUCKET = 1 << 26
OFFLOAD_BUCKETS = 3  # on the device at once: one steps, one comes, one goes
BITSANDBYTES = "bitsandbytes>=0.48"
EIGHT_BITS = 8 / 32  # of one moment, in units of float32

OPTIMIZERS: dict[str, OptimizerRecord] = {
    "adamw": OptimizerRecord(
        "trained weights, gradients and states in float32",
        "torch.optim:AdamW",
        ADAM_ARGUMENTS,
        {"step": ON_DEVICE, **ADAM},
        constants={"fused": True},
        prunable=("exp_avg", "exp_avg_sq"),
    ),
    "adamw_kahan": OptimizerRecord(
        "all in `dtype`, with Kahan summation; 10 bytes a weight in bfloat16 instead of 16",
        "headrace.trainer.optim.adamw_kahan:AdamWKahan",
        (*ADAM_ARGUMENTS, "triton"),
        {"step": COUNT, **ADAM, "compensation": ZEROS},
        keeps_dtype=True,
    ),
    "adamw_8bit": OptimizerRecord(
        "bitsandbytes, states in 8 bits",
        "bitsandbytes.optim:AdamW8bit",
        ADAM_ARGUMENTS,
        None,
        requirement=BITSANDBYTES,
        states_size=2 * EIGHT_BITS,
        elementwise=False,
    ),
    "adamw_8bit_paged": OptimizerRecord(
        "the same, in memory that may be paged out to the host",
        "bitsandbytes.optim:PagedAdamW8bit",
        ADAM_ARGUMENTS,
        None,
        requirement=BITSANDBYTES,
        cpu_substitute="adamw_8bit",
        states_size=2 * EIGHT_BITS,
        elementwise=False,
    ),
    "adamw_paged": OptimizerRecord(
        "bitsandbytes, states in float32 that may be paged out to the host",
        "bitsandbytes.optim:PagedAdamW32bit",
        ADAM_ARGUMENTS,
        None,
        requirement=BITSANDBYTES,
        cpu_substitute="adamw",
        states_size=2.0,
    ),
    "adam": OptimizerRecord(
        "no decay",
        "torch.optim:Adam",
        ADAM_ARGUMENTS,
        {"step": ON_DEVICE, **ADAM},
        constants={"fused": True},
        decays=False,
        prunable=("exp_avg", "exp_avg_sq"),
    ),
    "lion": OptimizerRecord(
        "one state; wants a learning rate some ten times lower",
        "lion_pytorch:Lion",
        ("lr", "betas"),
        {"exp_avg": ZEROS},
        requirement="lion-pytorch>=0.2.2",
        prunable=("exp_avg",),
    ),
    "lion_8bit": OptimizerRecord(
        "bitsandbytes, its state in 8 bits",
        "bitsandbytes.optim:Lion8bit",
        ("lr", "betas"),
        None,
        requirement=BITSANDBYTES,
        states_size=EIGHT_BITS,
        elementwise=False,
    ),
    "lion_8bit_paged": OptimizerRecord(
        "the same, in memory that may be paged out to the host",
        "bitsandbytes.optim:PagedLion8bit",
        ("lr", "betas"),
        None,
        requirement=BITSANDBYTES,
        cpu_substitute="lion_8bit",
        states_size=EIGHT_BITS,
        elementwise=False,
    ),
    "lion_paged": OptimizerRecord(
        "bitsandbytes, its state in float32 that may be paged out to the host",
        "bitsandbytes.optim:PagedLion32bit",
        ("lr", "betas"),
        None,
        requirement=BITSANDBYTES,
        cpu_substitute="lion",
        states_size=1.0,
    ),
    "muon": OptimizerRecord(
        "steps hidden matrices by the orthogonal part of their momentum, scaled to the size of "
        "AdamW's steps so that its rates fit; embedding, head, vectors and stacks of experts by "
        "AdamW",
        "headrace.trainer.optim.muon:MuonAndAdamW",
        (*ADAM_ARGUMENTS, "momentum"),
        {
            "momentum_buffer": State("zeros", "orthogonal"),
            "step": State("count_on_device", "other"),
            "exp_avg": State("zeros", "other"),
            "exp_avg_sq": State("zeros", "other"),
        },
        momentum=0.95,
        orthogonalizes=True,
        elementwise=False,
        prunable=("momentum_buffer", "exp_avg", "exp_avg_sq"),
    ),
    "sgd": OptimizerRecord(
        "with `momentum`; decay is a part of the gradient",
        "torch.optim:SGD",
        ("lr", "momentum"),
        {"momentum_buffer": State("zeros", "moving")},
        momentum=0.9,
        prunable=("momentum_buffer",),
    ),
    "adagrad": OptimizerRecord(
        "sums all squares; decay is a part of the gradient",
        "torch.optim:Adagrad",
        ("lr", "eps"),
        {"step": COUNT, "sum": ZEROS},
        prunable=("sum",),
    ),
    "adafactor": OptimizerRecord(
        "states of rows and columns; `beta1`, `beta2` and `eps` have no effect",
        "torch.optim:Adafactor",
        ("lr",),
        {
            "step": COUNT,
            "variance": State("zeros", "vector"),
            "row_var": State("rows", "matrix"),
            "col_var": State("columns", "matrix"),
        },
        elementwise=False,
    ),
    "adafactor_unscaled": OptimizerRecord(
        "transformers' own: a step's size is the learning rate, not that times the size of the "
        "weights; `beta1`, `beta2` and `eps` have no effect",
        "transformers.optimization:Adafactor",
        ("lr",),
        {
            "step": State("number"),
            "exp_avg_sq_row": State("rows_flat", "matrix"),
            "exp_avg_sq_col": State("columns_flat", "matrix"),
            "exp_avg_sq": State("zeros", "vector"),
            "RMS": State("count_on_device"),
        },
        constants={"scale_parameter": False, "relative_step": False},
        elementwise=False,
    ),
    "adamw_schedule_free": OptimizerRecord(
        "averages weights in place of a falling learning rate; evaluated, saved and exported are "
        "the averages",
        "schedulefree:AdamWScheduleFree",
        ADAM_ARGUMENTS,
        {"z": State("copy"), "exp_avg_sq": ZEROS},
        group_numbers=("k", "lr_max", "weight_sum"),
        requirement="schedulefree>=1.4",
        averages=True,
    ),
}
DESCRIPTION = " ".join(f'`"{name}"`: {record.description}.' for name, record in OPTIMIZERS.items())
