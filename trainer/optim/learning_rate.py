"""The learning rate as a function of the step."""

import math

from headrace.schemas.train.optimizer_config import OptimizerConfig, SchedulerConfig

ONE_CYCLE_START = 1 / 25  # of the peak; with the end, as torch.optim.lr_scheduler.OneCycleLR
ONE_CYCLE_END = ONE_CYCLE_START / 10_000
ONE_CYCLE_RISE = 0.3  # share of the steps


def learning_rate(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, step: int, total_steps: int
) -> float:
    """The rate of a step, from 0: warmup, then the schedule's own course to the last step."""
    if scheduler.force_constant_lr is not None:
        return scheduler.force_constant_lr
    warmup = warmup_steps(scheduler, total_steps)
    if scheduler.type == "one_cycle":
        return one_cycle(optimizer.lr, scheduler.min_lr, step, warmup, total_steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    match scheduler.type:
        case "constant":
            return optimizer.lr
        case "linear":
            return optimizer.lr + (scheduler.min_lr - optimizer.lr) * done
        case "cosine":
            return half_cosine(optimizer.lr, scheduler.min_lr, done)
        case "rms_ratio":
            return optimizer.lr * rms_ratio(optimizer.beta2, step + 1)


def warmup_steps(scheduler: SchedulerConfig, total_steps: int) -> int:
    """Steps before the full rate."""
    if scheduler.warmup_fraction is not None:
        return round(scheduler.warmup_fraction * total_steps)
    if scheduler.type == "one_cycle" and not scheduler.warmup_steps:
        return round(ONE_CYCLE_RISE * total_steps)
    return scheduler.warmup_steps


def half_cosine(start: float, end: float, done: float) -> float:
    """Return a value of the half cosine from `start` to `end`; `done` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(peak: float, floor: float, step: int, rise: int, total_steps: int) -> float:
    """Half a cosine up to the peak in the last of `rise` steps, half a cosine down to the floor."""
    top = max(rise - 1, 0)
    if step < top:
        return half_cosine(peak * ONE_CYCLE_START, peak, step / top)
    end = max(floor, peak * ONE_CYCLE_END)
    return half_cosine(peak, end, (step - top) / max(1, total_steps - 1 - top))


def rms_ratio(beta2: float, steps: int) -> float:
    """Return the inverse coefficient of variation of Adam's second moment, from 0 to 1.

    It rises by itself from sqrt((1 - beta2) / (1 + beta2)) and needs no horizon: training may go on
    for as long as one likes.

    Args:
        steps: this one counted, so that the first step does something.
    """
    return math.sqrt((1 - beta2**steps) / (1 + beta2**steps))
