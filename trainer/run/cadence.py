"""Schedule of a run's evaluations, checkpoints and end, as functions of its state."""

import time
from collections.abc import Callable

from headrace.schemas.train.run_state import RunState
from headrace.schemas.train.train_config import TrainConfig


class Cadence:
    """Schedule of the events due between two states of a run; the same answer at every rank."""

    def __init__(self, config: TrainConfig, total_steps: int, rows_per_epoch: int) -> None:
        self.every_steps = 1  # a spike is told from the losses of all steps before
        if config.anomalies.spike_factor is None:
            self.every_steps = config.reporting.every_steps
        self.evaluation = config.evaluation
        self.checkpoint = config.checkpoint
        self.total_steps = total_steps
        self.rows_per_epoch = rows_per_epoch

    def has_ended(self, state: RunState) -> bool:
        """Return whether all steps are done, or patience with evaluations has run out."""
        return state.step >= self.total_steps or self.is_out_of_patience(state)

    def is_out_of_patience(self, state: RunState) -> bool:
        """Return whether the run stops early."""
        patience = self.evaluation.patience
        return patience is not None and state.evaluations_since_best >= patience

    def reports(self, before: RunState, after: RunState) -> bool:
        """Return whether ranks share records of the steps so far; always where more is due."""
        due = is_multiple(after.step, self.every_steps) or self.has_ended(after)
        return due or self.evaluates(before, after) or self.saves(before, after)

    def evaluates(self, before: RunState, after: RunState) -> bool:
        """Return whether the step between these states is followed by an evaluation."""
        if after.step == self.total_steps and self.evaluation.after_last_step:
            return True
        return self._passed(
            before, after, self.evaluation.every_steps, self.evaluation.every_epochs
        )

    def saves(self, before: RunState, after: RunState) -> bool:
        """Return whether a checkpoint follows; `after` knows of an evaluation after that step."""
        improved = self.checkpoint.keep_best and after.best_step == after.step
        if improved or (self.checkpoint.at_end and self.has_ended(after)):
            return True
        return self._passed(
            before, after, self.checkpoint.every_steps, self.checkpoint.every_epochs
        )

    def _passed(
        self, before: RunState, after: RunState, steps: int | None, epochs: float | None
    ) -> bool:
        """Return whether a multiple of either interval was reached or passed."""
        if steps and after.step // steps > before.step // steps:
            return True
        rows = (epochs or 0) * self.rows_per_epoch
        return bool(rows) and after.rows_done // rows > before.rows_done // rows


def is_multiple(step: int, interval: int) -> bool:
    """Return whether a step ends an interval; 0 steps are none."""
    return interval > 0 and step % interval == 0


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()

    def lap(self) -> float:
        """Seconds since the last call, or since it was made; then begins anew."""
        now = self._clock()
        seconds, self._start = now - self._start, now
        return seconds


class Timer:
    """Minutes since the last save, by this rank's clock."""

    def __init__(
        self, every_minutes: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.every_minutes, self._clock = every_minutes, clock
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._start = self._clock()

    def is_due(self) -> bool:
        """Return whether the interval has passed."""
        if self.every_minutes is None:
            return False
        return self._clock() - self._start >= 60 * self.every_minutes
