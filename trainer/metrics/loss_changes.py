"""Change of evaluation losses, in percent of the first and of the last one before."""

import math


class LossChanges:
    """The first and the last loss of each evaluation set."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def note(self, name: str, loss: float) -> dict[str, float]:
        """Return the changes that a loss brings, and remember it; none at the first evaluation."""
        first, last = self._seen.get(name, (loss, math.nan))
        self._seen[name] = first, loss
        found = {"change_from_first_percent": first, "change_percent": last}
        return {
            key: 100 * (loss / before - 1)
            for key, before in found.items()
            if before and math.isfinite(before) and not math.isnan(last)
        }
