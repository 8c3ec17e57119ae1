"""Timeline of the instructions of a pipeline step, on the device's own clock."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from headrace.trainer import devices

Moment: TypeAlias = "torch.Event | float"
PROFILE_FOLDER = "profile"


@dataclass(frozen=True)
class Span:
    """One instruction: seconds since the step began. `name` is the schedule's class, or "data"."""

    name: str
    start: float
    end: float


class Timeline:
    """Records spans without waiting for the device; they are read when the step is over.

    Args:
        wanted: without it nothing is recorded.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self.device = device
        self.wanted = wanted
        self._marks: list[tuple[str, Moment, Moment]] = []

    def begin(self) -> None:
        """Forget what was recorded before the step, such as an evaluation."""
        self._marks.clear()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if not self.wanted:
            yield
            return
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        """The same function, recorded under a name."""

        def run(*arguments: Any, **named: Any) -> None:
            with self.span(name):
                function(*arguments, **named)

        return run

    def take(self) -> list[Span]:
        """The spans of the step, from the first one's start on; waits for the device."""
        marks, self._marks = self._marks, []
        devices.synchronize(self.device)
        if not marks:
            return []
        origin = marks[0][1]
        return [Span(name, _between(origin, a), _between(origin, b)) for name, a, b in marks]

    def _now(self) -> Moment:
        event: Moment | None = devices.record_event(self.device, timed=True)
        return time.perf_counter() if event is None else event


def _between(start: Moment, end: Moment) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1e3


class TimelineLog:
    """`profile/timeline-RANK.jsonl` of a run: one line a step."""

    def __init__(self, run_directory: Path, rank: int) -> None:
        path = run_directory / PROFILE_FOLDER / f"timeline-{rank:03d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, seconds: float, spans: list[Span]) -> None:
        line = {"step": step, "seconds": seconds, "spans": [asdict(span) for span in spans]}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


@contextmanager
def traced(run_directory: Path, rank: int, wanted: bool) -> Iterator[None]:
    """Trace what runs inside with torch's profiler, for chrome://tracing and as a table."""
    if not wanted:
        yield
        return
    folder = run_directory / PROFILE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(folder / f"trace-{rank:03d}.json.gz"))
    device = devices.device_type()
    table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=60)
    (folder / f"trace-{rank:03d}.txt").write_text(table, encoding="utf-8")
