"""The schedules of `[scheduler]`, one object each: formula, keys, and what else others ask of one.

To add a schedule, write a class and name it in `SCHEDULES`; all else follows from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

DecayShape = Literal["linear", "cosine", "1-sqrt"]
WarmupShape = Literal["linear", "quadratic"]

# how much is left of a fall, by the share of it that is done, as transformers' get_wsd_schedule
LEFT: dict[DecayShape, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}
POWERS: dict[WarmupShape, int] = {"linear": 1, "quadratic": 2}
WARMUP_KEYS = ("warmup_shape",)


@dataclass(frozen=True)
class Moment:
    """One step of a run, with all numbers that a schedule may look at.

    Attributes:
        step: from 0.
        warmup: steps of warmup.
        steps: of the whole run.
        peak: `optimizer.lr`; floor: `scheduler.min_lr`.
        decay: steps of the fall at the end (`decay_steps` or `decay_fraction`).
        fall_fraction: share of all steps by whose end a cosine has fallen.
        div_factor: of one-cycle's start.
    """

    step: int
    warmup: int
    steps: int
    peak: float
    floor: float
    beta2: float
    warmup_shape: WarmupShape
    decay: int
    decay_shape: DecayShape
    fall_fraction: float
    div_factor: float

    def between(self, left: float) -> float:
        """Return the rate of which a share between floor and peak is left."""
        return self.floor + (self.peak - self.floor) * left


class Schedule:
    """One schedule: the learning rate as a function of the step.

    Attributes:
        description: for the config reference.
        has_horizon: its rates depend on the number of all steps.
        keys: keys of `[scheduler]` that it reads beside those that all do.
        usual_warmup: share of all steps, where the config says nothing.
        needs_floor: `min_lr` must be above 0.
    """

    description: ClassVar[str]
    has_horizon: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = WARMUP_KEYS
    usual_warmup: ClassVar[float] = 0.0
    needs_floor: ClassVar[bool] = False

    def rate(self, at: Moment) -> float:
        """Return the rate of a step: warmup, then the schedule's own."""
        if at.step < at.warmup:
            risen: float = ((at.step + 1) / at.warmup) ** POWERS[at.warmup_shape]
            return at.peak * risen
        return self.after_warmup(at, (at.step - at.warmup) / max(1, at.steps - at.warmup))

    def after_warmup(self, at: Moment, done: float) -> float:
        """Return the rate of a step after the warmup.

        Args:
            done: share of the steps after the warmup that lies behind, from 0 to below 1.
        """
        raise NotImplementedError


class Constant(Schedule):
    """The peak."""

    description = "the rate stays"
    has_horizon = False

    def after_warmup(self, at: Moment, done: float) -> float:
        return at.peak


class Linear(Schedule):
    """A straight line."""

    description = "a straight line to `min_lr`"

    def after_warmup(self, at: Moment, done: float) -> float:
        return at.peak + (at.floor - at.peak) * done


class Cosine(Schedule):
    """Half a cosine, which may end before the run (https://arxiv.org/abs/2308.04014)."""

    description = (
        "half a cosine to `min_lr`, over all steps or the first `fall_fraction` of them, after "
        "which it stays there"
    )
    keys = (*WARMUP_KEYS, "fall_fraction")

    def after_warmup(self, at: Moment, done: float) -> float:
        last = int(at.steps * at.fall_fraction)
        fallen = (min(at.step, last) - at.warmup) / max(1, last - at.warmup)
        return half_cosine(at.peak, at.floor, max(0.0, fallen))


class OneCycle(Schedule):
    """Half a cosine up, half a cosine down, as torch's `OneCycleLR`."""

    description = (
        "half a cosine up from lr / `div_factor` over the warmup (default: 30% of the steps), half "
        "a cosine down to `min_lr`, at least a 10,000th of the start"
    )
    keys = ("div_factor",)
    usual_warmup = 0.3

    def rate(self, at: Moment) -> float:
        top, start = max(at.warmup - 1, 0), at.peak / at.div_factor
        if at.step < top:
            return half_cosine(start, at.peak, at.step / top)
        end = max(at.floor, start / 10_000)
        return half_cosine(at.peak, end, (at.step - top) / max(1, at.steps - 1 - top))


class RmsRatio(Schedule):
    """The inverse coefficient of variation of Adam's second moment, from 0 to 1.

    It rises by itself from sqrt((1 - beta2) / (1 + beta2)) and needs no horizon: training may go on
    for as long as one likes. This step is counted, so that the first does something.
    """

    description = (
        "follows the settling of Adam's second moment, lr * sqrt((1 - beta2^t) / (1 + beta2^t)), "
        "and needs no horizon"
    )
    has_horizon = False

    def after_warmup(self, at: Moment, done: float) -> float:
        settled = at.beta2 ** (at.step + 1)
        return at.peak * math.sqrt((1 - settled) / (1 + settled))


class WarmupStableDecay(Schedule):
    """Constant, then a fall at the end (https://arxiv.org/abs/2404.06395)."""

    description = (
        "the rate stays until the last `decay_steps` or `decay_fraction` of the steps (default: "
        "10%), in which it falls to `min_lr`"
    )
    keys = (*WARMUP_KEYS, "decay_steps", "decay_fraction", "decay_shape")

    def after_warmup(self, at: Moment, done: float) -> float:
        fallen = (at.step - (at.steps - at.decay)) / max(1, at.decay)
        return at.peak if fallen <= 0 else at.between(LEFT[at.decay_shape](fallen))


class Rex(Schedule):
    """A reflected exponential (https://arxiv.org/abs/2107.04197): slow first, fast at the end."""

    description = (
        "min_lr + (lr - min_lr) * z / (0.1 + 0.9 z) with z the share of the steps that is left"
    )

    def after_warmup(self, at: Moment, done: float) -> float:
        left = 1 - done
        return at.between(left / (0.1 + 0.9 * left))


class LogSweep(Schedule):
    """A search for the rate: from floor to peak by one factor at each step, as Axolotl's."""

    description = (
        "rises from `min_lr` to lr by the same factor at each step but the first, over "
        "`warmup_steps`, then stays: a search for the right rate"
    )
    keys = ()
    usual_warmup = 1.0
    needs_floor = True

    def rate(self, at: Moment) -> float:
        if at.step >= at.warmup:
            return at.peak
        factor: float = (at.peak / at.floor) ** (1 / max(1, at.warmup - 1))
        return float(at.floor * factor ** max(0, at.step - 1))


def half_cosine(start: float, end: float, done: float) -> float:
    """Return a value of the half cosine from `start` to `end`; `done` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(),
    "linear": Linear(),
    "cosine": Cosine(),
    "one_cycle": OneCycle(),
    "rms_ratio": RmsRatio(),
    "warmup_stable_decay": WarmupStableDecay(),
    "rex": Rex(),
    "log_sweep": LogSweep(),
}
OWN_KEYS = sorted({key for schedule in SCHEDULES.values() for key in schedule.keys})
SCHEDULE_DESCRIPTION = " ".join(
    f'`"{name}"`: {schedule.description}.' for name, schedule in SCHEDULES.items()
)
