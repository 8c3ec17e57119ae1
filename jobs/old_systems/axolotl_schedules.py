"""Converters of Axolotl's schedules and of the keys that they read.

The schedules are transformers', torch's OneCycleLR, and Axolotl's own: `rex`, `log_sweep`, a cosine
with quadratic warmup, and one that ends before the run.
"""

from typing import Any

from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    NoEquivalentError,
    Values,
    computed,
    elsewhere,
    exact_choice,
)
from headrace.schemas.errors import ConfigError

SCHEDULE, MIN_LR, DIV, FALL, SHAPE, DECAY, DECAY_SHAPE, STEPS, FRACTION = (
    f"train.scheduler.{key}"
    for key in (
        *("type", "min_lr", "div_factor", "fall_fraction", "warmup_shape", "decay_steps"),
        *("decay_shape", "warmup_steps", "warmup_fraction"),
    )
)
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "one_cycle": "one_cycle",
    "rex": "rex",
    "log_sweep": "log_sweep",
    "warmup_stable_decay": "warmup_stable_decay",
    "cosine_with_min_lr": "cosine",
}
COURSE = exact_choice("lr_scheduler", SCHEDULE, SCHEDULES, default="cosine")
LOW, HIGH = 1e-10, 10.0  # of log_sweep, unless they are given
LAST = 10_000.0  # the start of one-cycle over its end
# of `lr_scheduler_kwargs`, by schedule: what is read, with the values that may stand for the others
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "one_cycle": {"anneal_strategy": ("cos",), "three_phase": (False,), "cycle_momentum": (False,)},
    "warmup_stable_decay": {"warmup_type": ("linear",), "num_cycles": (0.5,)},
    "cosine": {"num_cycles": (0.5,)},
}
READ_KWARGS = {
    "one_cycle": ("div_factor", "final_div_factor", "pct_start"),
    "warmup_stable_decay": ("num_decay_steps", "decay_type", "min_lr_ratio"),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
}
MOMENTUM_CYCLES = (
    '"one_cycle" is written: beta1 stays, there it falls to 0.85 and rises to 0.95 again, unless '
    "lr_scheduler_kwargs.cycle_momentum is false"
)


def schedule(value: Any, values: Values) -> dict[str, Any]:
    """Convert the schedule with the numbers that it reads."""
    assert COURSE.convert is not None
    found = COURSE.convert(value, values)
    if value == "one_cycle":
        found |= one_cycle(values)
        if kwargs(values).get("cycle_momentum", True):
            raise NoEquivalentError(MOMENTUM_CYCLES, found)
    elif value == "warmup_stable_decay":
        found |= stable_decay(values)
    elif value == "cosine_with_min_lr":
        found[MIN_LR] = lowest(values)
    elif value == "log_sweep":
        found[MIN_LR] = float(values.get("log_sweep_min_lr") or LOW)
    return found


def kwargs(values: Values) -> dict[str, Any]:
    return dict(values.get("lr_scheduler_kwargs") or {})


def lowest(values: Values) -> float:
    """Return a floor that is given as a rate, or as a share of the peak."""
    given = kwargs(values)
    if "min_lr" in given:
        return float(given["min_lr"])
    return float(given["min_lr_rate"]) * float(values["learning_rate"])


def one_cycle(values: Values) -> dict[str, Any]:
    given = kwargs(values)
    found: dict[str, Any] = {}
    div = float(given.get("div_factor") or values.get("lr_div_factor") or 25)
    if div != 25:
        found[DIV] = div
    if "final_div_factor" in given:
        last = float(given["final_div_factor"])
        if last > LAST:
            raise ConfigError(
                f"lr_scheduler_kwargs: final_div_factor = {last:g}: at most {LAST:g} is there"
            )
        found[MIN_LR] = float(values["learning_rate"]) / div / last
    if "pct_start" in given:
        found[FRACTION] = float(given["pct_start"])
    return found


def stable_decay(values: Values) -> dict[str, Any]:
    given = kwargs(values)
    if "num_decay_steps" not in given or "num_stable_steps" in given:
        raise ConfigError(
            "lr_scheduler: warmup_stable_decay: the fall is of the run's last steps; give "
            "lr_scheduler_kwargs.num_decay_steps, without num_stable_steps"
        )
    floor = float(given.get("min_lr_ratio", 0)) * float(values["learning_rate"])
    found = {DECAY: int(given["num_decay_steps"])} | ({MIN_LR: floor} if floor else {})
    return found | ({DECAY_SHAPE: given["decay_type"]} if "decay_type" in given else {})


def remaining_kwargs(value: Any, values: Values) -> dict[str, Any]:
    """Report arguments of the schedule that are not taken over.

    Raises:
        ConfigError: one that would train something else.
    """
    kind = str(values.get("lr_scheduler") or "cosine")
    given, fixed = kwargs(values), FIXED.get(kind, {})
    for key in fixed.keys() & given.keys():
        usual_elsewhere = key == "cycle_momentum"  # reported with the schedule
        if given[key] not in fixed[key] and not usual_elsewhere:
            raise ConfigError(
                f"lr_scheduler_kwargs: {key} = {given[key]!r} is not there; only "
                f"{fixed[key][0]!r} is"
            )
    left = sorted(given.keys() - {*fixed, *READ_KWARGS.get(kind, ()), "num_stable_steps"})
    if left:
        raise NoEquivalentError(f"{', '.join(left)}: `scheduler` has keys for what it knows")
    return {}


def is_cosine(values: Values) -> bool:
    return (values.get("lr_scheduler") or "cosine") == "cosine"


def peak(value: Any, values: Values) -> dict[str, Any]:
    """Convert the rate; `log_sweep` has its own, and does not look at it."""
    if values.get("lr_scheduler") == "log_sweep":
        value = values.get("log_sweep_max_lr") or HIGH
    return {"train.optimizer.lr": float(value)}


def min_rate(value: float, values: Values) -> dict[str, Any]:
    """Convert the floor, a share of the rate; quadratic warmup drops it there."""
    if not value:
        return {}
    square = is_cosine(values) and values.get("lr_quadratic_warmup") is True
    if square or not (is_cosine(values) or values.get("lr_scheduler") == "rex"):
        raise NoEquivalentError("has no effect there with this schedule")
    return {MIN_LR: float(value) * float(values["learning_rate"])}


def quadratic(value: Any, values: Values) -> dict[str, Any]:
    if value is not True:
        return {}
    if not is_cosine(values):
        raise NoEquivalentError("has no effect there with this schedule")
    return {SHAPE: "quadratic"}


def early_end(value: Any, values: Values) -> dict[str, Any]:
    if not value:
        return {}
    used = is_cosine(values) and values.get("cosine_min_lr_ratio")
    if not used or values.get("lr_quadratic_warmup") is True:
        raise NoEquivalentError("has no effect there without cosine_min_lr_ratio")
    return {FALL: float(value)}


def div_factor(value: Any, values: Values) -> dict[str, Any]:
    if value and values.get("lr_scheduler") != "one_cycle":
        raise NoEquivalentError("has no effect there without one_cycle")
    return {}


DEFAULT_WARMUP = "3% of the steps"
MOST_DEFAULT_STEPS = 100


def without_warmup(values: Values) -> str | None:
    """Return why keys of warmup have no effect there; None where they have one."""
    if values.get("lr_scheduler") == "constant":
        return "`constant` has no warmup there; `constant_with_warmup` does"
    if "pct_start" in kwargs(values):
        return "lr_scheduler_kwargs.pct_start counts"
    return None


def warmup(value: Any, values: Values) -> dict[str, Any]:
    """Convert steps, below 1 a share of all, and Axolotl's choice where nothing is said."""
    reason = without_warmup(values)
    if value == DEFAULT_WARMUP:
        if values.get("warmup_ratio") is not None or reason:
            return {}
        steps = int(0.03 * values.get("max_steps", 0) or 0)
        if steps > 0:
            return {STEPS: min(steps, MOST_DEFAULT_STEPS)}
        value = 0.03
    if value and reason:
        raise NoEquivalentError(reason)
    if 0 < value < 1:
        return {FRACTION: float(value)}
    return {STEPS: int(value)} if value or not reason else {}


def warmup_share(value: float, values: Values) -> dict[str, Any]:
    reason = without_warmup(values)
    if value and reason:
        raise NoEquivalentError(reason)
    return {FRACTION: float(value)} if value else {}


SCHEDULE_ROWS: tuple[Equivalent, ...] = (
    computed("learning_rate", "train.optimizer.lr", peak),
    computed(
        "lr_scheduler",
        (SCHEDULE, MIN_LR, DIV, DECAY, DECAY_SHAPE, FRACTION),
        schedule,
        f"{COURSE.note}. `log_sweep`: over `warmup_steps`",
        default="cosine",
    ),
    computed(
        "lr_scheduler_kwargs",
        (DIV, MIN_LR, FRACTION, DECAY, DECAY_SHAPE),
        remaining_kwargs,
        "of one_cycle: `div_factor`, `final_div_factor`, `pct_start`; of warmup_stable_decay: "
        "`num_decay_steps`, `decay_type`, `min_lr_ratio`; of cosine_with_min_lr: `min_lr`, "
        "`min_lr_rate`",
    ),
    elsewhere("log_sweep_min_lr", MIN_LR, "default there 1e-10"),
    elsewhere("log_sweep_max_lr", "train.optimizer.lr", "default there 10"),
    computed(
        "warmup_steps",
        (STEPS, FRACTION),
        warmup,
        "below 1 a share of all steps. Left out, as `warmup_ratio`: 3% of the steps, there at "
        "most 100 of them, which is written with `max_steps` alone",
        default=DEFAULT_WARMUP,
    ),
    computed("warmup_ratio", FRACTION, warmup_share, "of `constant` neither, as there"),
    computed("lr_quadratic_warmup", SHAPE, quadratic, "of a cosine, as there"),
    computed("cosine_min_lr_ratio", MIN_LR, min_rate, "times the rate; of cosine and rex"),
    computed(
        "cosine_constant_lr_ratio",
        FALL,
        early_end,
        "of a cosine with `cosine_min_lr_ratio`, as there",
    ),
    computed("lr_div_factor", DIV, div_factor, "of one_cycle"),
)
