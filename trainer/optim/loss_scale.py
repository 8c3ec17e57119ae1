"""Scaling of the loss, without which small gradients are zero in float16.

The scale is a power of two, so it changes no bit of what neither vanishes nor overflows. As torch's
`GradScaler` does, it is halved, and the step skipped, when gradients overflow, and doubled after
2,000 steps without (https://arxiv.org/abs/1710.03740, section 3.2).
"""

import math
from dataclasses import dataclass

from headrace.schemas.train.run_state import RunState

FIRST, LARGEST = 2.0**16, 2.0**24
STEPS_TO_GROW = 2_000


@dataclass(frozen=True)
class LossScale:
    """The scale of a step, and the steps since the last overflow or growth."""

    factor: float = 1.0  # below 2: gradients are not scaled any more
    steps: int = 0

    def overflows(self, norm: float) -> bool:
        """Return whether a gradient that is not finite may be the scale's fault."""
        return self.factor > 1 and not math.isfinite(norm)

    def after(self, norm: float) -> "LossScale":
        """Return the scale of the next step.

        Args:
            norm: of this step's gradient.
        """
        if self.overflows(norm):
            return LossScale(self.factor / 2)
        if self.steps + 1 < STEPS_TO_GROW:
            return LossScale(self.factor, self.steps + 1)
        return LossScale(min(LARGEST, 2 * self.factor))


def scale_of(dtype: str, state: RunState) -> LossScale | None:
    """Return the scale of the next step; None where the computation needs none."""
    if dtype != "float16":
        return None
    return LossScale(state.loss_scale or FIRST, state.loss_scale_steps)
