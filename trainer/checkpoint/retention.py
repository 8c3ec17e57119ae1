"""Retention of checkpoints: the newest are kept, and the best one where it is asked for."""

from collections.abc import Sequence
from pathlib import Path

from headrace.schemas.checkpoint_names import checkpoint_name


def expired(finished: Sequence[Path], keep_last: int, best_step: int | None) -> list[Path]:
    """Return the checkpoints that may go.

    Args:
        finished: all that are published, oldest first.
        keep_last: so many of the newest stay.
        best_step: the step after which the evaluation loss was lowest, if that one stays too.
    """
    best = None if best_step is None else checkpoint_name(best_step)
    return [path for path in finished[:-keep_last] if path.name != best]
