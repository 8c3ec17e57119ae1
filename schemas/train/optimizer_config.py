"""The tables that say how `headrace train` trains: `[optimizer]`, `[scheduler]`,
`[regularization]`, `[relora]`.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from headrace.schemas.config_model import Config
from headrace.schemas.train.optimizers import DESCRIPTION, OPTIMIZERS, OptimizerRecord
from headrace.schemas.train.schedules import (
    OWN_KEYS,
    SCHEDULE_DESCRIPTION,
    SCHEDULES,
    DecayShape,
    Schedule,
    WarmupShape,
)

if TYPE_CHECKING:
    OptimizerType = str
    ScheduleType = str
else:
    OptimizerType = Literal[tuple(OPTIMIZERS)]
    ScheduleType = Literal[tuple(SCHEDULES)]


class OptimizerConfig(Config):
    """`[optimizer]`."""

    type: OptimizerType = Field("adamw", description=DESCRIPTION)
    lr: float = Field(gt=0, description="Peak learning rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-6, gt=0, description="Added to the root of the second moment.")
    momentum: float | None = Field(
        None, ge=0, lt=1, description='Momentum of `"sgd"` (default 0.9) and `"muon"` (0.95).'
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Decoupled decay, but with `sgd` and `adagrad`; not applied to norms and "
        "biases.",
    )
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of the adapters' B over that of A (LoRA+)."
    )
    gradient_clipping: float = Field(
        1.0, ge=0, description="Largest norm of the whole gradient; 0 turns clipping off."
    )

    shard: bool = Field(
        False,
        description="Share the states out among all processes that hold the same weights: "
        "replicas, and those that share rows. Each steps its part of every weight (ZeRO-1).",
    )
    offload: bool = Field(
        False,
        description="Hold the states in host memory, and bring them to the GPU a few weights at a "
        "time.",
    )

    @property
    def record(self) -> OptimizerRecord:
        """Return all that is known of the optimizer."""
        return OPTIMIZERS[self.type]

    @property
    def used_momentum(self) -> float:
        """Return the momentum, the optimizer's usual one unless it is given; 0 if it has none."""
        given = self.record.momentum if self.momentum is None else self.momentum
        return given or 0.0

    @model_validator(mode="after")
    def check_momentum(self) -> "OptimizerConfig":
        if self.momentum is not None and self.record.momentum is None:
            fitting = (f'"{name}"' for name, other in OPTIMIZERS.items() if other.momentum)
            raise ValueError(
                f'momentum = {self.momentum}: type = "{self.type}" has none (beta1 is that of the '
                f"moments); drop it, or set type to {' or '.join(fitting)}"
            )
        return self

    @model_validator(mode="after")
    def check_states(self) -> "OptimizerConfig":
        if self.shard and not self.record.shardable:
            fitting = ", ".join(name for name, record in OPTIMIZERS.items() if record.shardable)
            raise ValueError(
                f'shard = true: the states of type = "{self.type}" are of whole weights or blocks '
                f"of them, or its library's own, and cannot be shared out; choose one of {fitting}"
            )
        if self.offload and self.record.states is None:
            raise ValueError(
                f'offload = true: the states of type = "{self.type}" are its library\'s own; set '
                'type = "adamw_paged" or "adamw_8bit_paged", or another one'
            )
        return self

    @model_validator(mode="after")
    def check_decay(self) -> "OptimizerConfig":
        given = "weight_decay" in self.model_fields_set
        if not self.record.decays and given and self.weight_decay:
            raise ValueError(
                f'weight_decay = {self.weight_decay}: type = "{self.type}" has no decay; '
                'set type = "adamw", or drop it'
            )
        return self


class SchedulerConfig(Config):
    """`[scheduler]`."""

    type: ScheduleType = Field(
        "constant", description=f"Learning rate after warmup. {SCHEDULE_DESCRIPTION}"
    )
    warmup_steps: int = Field(
        0, ge=0, description="Steps of warmup; the first runs at lr / warmup_steps."
    )
    warmup_fraction: float | None = Field(
        None, gt=0, lt=1, description="Warmup as a share of all steps, instead of `warmup_steps`."
    )
    warmup_shape: WarmupShape = Field(
        "linear", description='`"quadratic"`: the square of the share of the warmup that is done.'
    )
    min_lr: float = Field(0.0, ge=0, description="Where falling schedules end.")
    fall_fraction: float = Field(
        1.0, gt=0, le=1, description="`cosine`: share of all steps by whose end it has fallen."
    )
    decay_steps: int | None = Field(
        None, ge=1, description="`warmup_stable_decay`: steps of the fall, the last of the run."
    )
    decay_fraction: float = Field(
        0.1, gt=0, le=1, description="The same as a share of all steps, instead of `decay_steps`."
    )
    decay_shape: DecayShape = Field(
        "cosine", description="Shape of the fall: half a cosine, a line, or a falling root."
    )
    div_factor: float = Field(25.0, ge=1, description="`one_cycle`: it starts at lr over this.")
    force_constant_lr: float | None = Field(
        None,
        gt=0,
        description="This rate, whatever the other keys say; may be set when a run is resumed.",
    )

    @property
    def schedule(self) -> Schedule:
        """Return the schedule itself."""
        return SCHEDULES[self.type]

    @property
    def has_horizon(self) -> bool:
        """Return whether the learning rate of a step depends on the total number of steps."""
        if self.force_constant_lr is not None:
            return False
        return self.schedule.has_horizon or self.warmup_fraction is not None

    @model_validator(mode="after")
    def check_warmup(self) -> "SchedulerConfig":
        if self.warmup_steps and self.warmup_fraction is not None:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and warmup_fraction = {self.warmup_fraction} "
                "exclude each other; keep one"
            )
        if {"decay_steps", "decay_fraction"} <= self.model_fields_set:
            raise ValueError(
                f"decay_steps = {self.decay_steps} and decay_fraction = {self.decay_fraction} "
                "exclude each other; keep one"
            )
        return self

    @model_validator(mode="after")
    def check_keys(self) -> "SchedulerConfig":
        for key in OWN_KEYS:
            if key in self.model_fields_set and key not in self.schedule.keys:
                fitting = (f'"{name}"' for name, other in SCHEDULES.items() if key in other.keys)
                raise ValueError(
                    f'{key} = {getattr(self, key)!r} has no meaning with type = "{self.type}"; '
                    f"drop it, or set type to {' or '.join(fitting)}"
                )
        if self.schedule.needs_floor and not self.min_lr:
            raise ValueError(f'type = "{self.type}" starts at min_lr; set it above 0')
        return self


class RegularizationConfig(Config):
    """`[regularization]`."""

    product_decay: float = Field(
        0.0,
        ge=0,
        description="Decay of the product BA of each adapter, not of A and B by themselves: after "
        "each step A falls by lr * decay * B^T BA and B by lr * decay * BA A^T.",
    )
    max_product_norm: float | None = Field(
        None,
        gt=0,
        description="Largest Frobenius norm of what an adapter adds to its weight, (alpha / rank) "
        "BA; beyond it A and B are scaled down after each step.",
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="Uniform noise on the embeddings of training rows, of at most "
        "alpha / sqrt(tokens of the row x hidden size) (NEFTune).",
    )

    @property
    def limits_products(self) -> bool:
        """Return whether adapters are changed after each step."""
        return bool(self.product_decay) or self.max_product_norm is not None


class ReloraConfig(Config):
    """`[relora]`."""

    every_steps: int | None = Field(
        None,
        ge=1,
        description="After so many steps the adapters are added to the frozen weights and start "
        "anew (ReLoRA). Default: never.",
    )
    warmup_steps: int = Field(
        10, ge=0, description="Steps after each restart over which the rate rises again from 0."
    )
    prune: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Share of the optimizer's moments that a restart sets to 0, the smallest "
        "first; 1 forgets all.",
    )

    @model_validator(mode="after")
    def check_warmup(self) -> "ReloraConfig":
        if self.every_steps is not None and self.warmup_steps >= self.every_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} must be below every_steps = {self.every_steps}"
            )
        return self
