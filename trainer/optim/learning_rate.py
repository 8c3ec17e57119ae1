"""The learning rate as a function of the step, by the schedule of the config."""

from headrace.schemas.train.optimizer_config import OptimizerConfig, SchedulerConfig
from headrace.schemas.train.schedules import Moment


def learning_rate(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, step: int, total_steps: int
) -> float:
    """Return the rate of a step, from 0."""
    if scheduler.force_constant_lr is not None:
        return scheduler.force_constant_lr
    return scheduler.schedule.rate(
        Moment(
            step=step,
            warmup=warmup_steps(scheduler, total_steps),
            steps=total_steps,
            peak=optimizer.lr,
            floor=scheduler.min_lr,
            beta2=optimizer.beta2,
            warmup_shape=scheduler.warmup_shape,
            decay=decay_steps(scheduler, total_steps),
            decay_shape=scheduler.decay_shape,
            fall_fraction=scheduler.fall_fraction,
            div_factor=scheduler.div_factor,
        )
    )


def warmup_steps(scheduler: SchedulerConfig, total_steps: int) -> int:
    """Return the steps before the full rate."""
    if scheduler.warmup_steps:
        return scheduler.warmup_steps
    share = scheduler.warmup_fraction
    return round((scheduler.schedule.usual_warmup if share is None else share) * total_steps)


def decay_steps(scheduler: SchedulerConfig, total_steps: int) -> int:
    """Return the steps of the fall at the end of a run."""
    if scheduler.decay_steps is not None:
        return scheduler.decay_steps
    return round(scheduler.decay_fraction * total_steps)
