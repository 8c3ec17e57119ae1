"""Steps that are done and not reported yet."""

from dataclasses import dataclass

from headrace.trainer.data.feed import StepInputs
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.run.metrics import StepMetrics, mean_loss
from headrace.trainer.run.step_report import Report, StepFacts, step_metrics


@dataclass(frozen=True)
class DoneStep:
    """One step, with the reports of all ranks."""

    reports: list[Report]
    inputs: StepInputs
    facts: StepFacts

    @property
    def loss(self) -> float:
        """Return the loss of the global batch."""
        return mean_loss(row for report in self.reports for row in report.losses)

    def metrics(self) -> StepMetrics:
        """The whole job's."""
        return step_metrics(self.reports, self.inputs, self.facts)


class Interval:
    """Keeps what this rank knows of each step until the ranks tell each other."""

    def __init__(self) -> None:
        self._steps: list[tuple[Report, StepInputs, StepFacts]] = []

    def add(self, report: Report, inputs: StepInputs, facts: StepFacts) -> None:
        """A step is done."""
        self._steps.append((report, inputs, facts))

    def close(self, layout: Layout) -> list[DoneStep]:
        """The steps since the last call, in order; every rank takes part."""
        steps, self._steps = self._steps, []
        everyone = gather_objects([report for report, _, _ in steps], layout.world_group)
        return [
            DoneStep(list(reports), inputs, facts)
            for reports, (_, inputs, facts) in zip(zip(*everyone, strict=True), steps, strict=True)
        ]
