"""Steps that are done and not reported yet."""

from dataclasses import dataclass
from itertools import chain

from headrace.trainer.messages import gather
from headrace.trainer.metrics.metrics import StepFacts, StepMetrics, mean_loss
from headrace.trainer.parallel import RankLayout
from headrace.trainer.run.step_report import Report, batch_places, step_metrics
from headrace.trainer.shards.packed_rows import PackedRow


@dataclass(frozen=True)
class DoneStep:
    """One step, with the reports of all ranks."""

    reports: list[Report]
    facts: StepFacts
    capacity: int  # tokens of all sequences of a row

    @property
    def loss(self) -> float:
        """Return the loss of the global batch."""
        return mean_loss(row for report in self.reports for row in report.losses)

    @property
    def rows(self) -> list[PackedRow]:
        """Return the rows of the global batch."""
        return list(chain.from_iterable(batch_places(self.reports)))

    def metrics(self) -> StepMetrics:
        """Return the whole job's metrics."""
        return step_metrics(self.reports, self.facts, self.capacity)


class Interval:
    """Keeps what this rank knows of each step until the ranks tell each other.

    Args:
        capacity: tokens of all sequences of a row.
    """

    def __init__(self, layout: RankLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self._steps: list[tuple[Report, StepFacts]] = []

    def add(self, report: Report, facts: StepFacts) -> None:
        """Note a step that is done."""
        self._steps.append((report, facts))

    def close(self) -> list[DoneStep]:
        """Return the steps since the last call, in order; every rank takes part."""
        steps, self._steps = self._steps, []
        everyone = gather([report for report, _ in steps], self.layout.world_group)
        return [
            DoneStep(list(reports), facts, self.capacity)
            for reports, (_, facts) in zip(zip(*everyone, strict=True), steps, strict=True)
        ]
