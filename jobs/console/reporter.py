"""A run of `headrace.dataprep` on the terminal: a bar for each pass, tables at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from headrace.dataprep.work.reporter import Bar
from headrace.jobs.console.ledger import print_ledger
from headrace.schemas.shards.manifest import Manifest


class ConsoleReporter:
    """Draws on a console.

    Args:
        console: default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(markup=False, emoji=False)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """Draw a bar until the pass is over."""
        with progress_bar(self.console) as progress:
            yield DrawnBar(progress, progress.add_task(title, total=total, counts=""))

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    def finished(self, manifest: Manifest) -> None:
        """Print the sources, and where every token went."""
        print_ledger(self.console, manifest)


@dataclass(frozen=True)
class DrawnBar:
    """One bar of a console."""

    progress: Progress
    task: TaskID

    def update(self, done: float, counts: str = "") -> None:
        """Move to `done`, with counts beside the bar."""
        self.progress.update(self.task, completed=done, counts=counts)


class MegabytesPerSecond(ProgressColumn):
    """Input read per second, in MB of 10^6 bytes."""

    def render(self, task: Task) -> Text:
        """The rate, empty until there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed / 1e6:.1f} MB/s" if speed else "")


def progress_bar(console: Console) -> Progress:
    """A bar over bytes, with a text of counts, the rate, and the time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counts]}", markup=False),
        MegabytesPerSecond(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=60,
    )
