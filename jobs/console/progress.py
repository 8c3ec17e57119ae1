"""A bar with rate and time left, on the terminal alone: what a command prints stays its own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")


class Rate(ProgressColumn):
    """Bytes, or whatever is counted, per second.

    Args:
        unit: what is counted; None is bytes.
    """

    def __init__(self, unit: str | None) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Empty until there is a rate."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(
            f"{decimal(int(speed))}/s" if self.unit is None else f"{speed:.1f} {self.unit}/s"
        )


def tracked(
    items: Iterable[Item],
    sizes: Sequence[int],
    description: str,
    unit: str | None = None,
    console: Console | None = None,
) -> Iterator[Item]:
    """Yield the items under a bar, which moves by an item's size once the next one is asked for.

    Args:
        sizes: of each item, in bytes or units.
        console: default: standard error; nothing is drawn where it is no terminal.
    """
    console = console or Console(stderr=True, markup=False, emoji=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), Rate(unit))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=sum(sizes))
        for item, size in zip(items, sizes, strict=True):
            yield item
            bar.advance(task, size)
