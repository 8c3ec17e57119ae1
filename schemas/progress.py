"""Progress of long work, as a callback: who starts the work decides how it is shown."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Passes items on to a loop, and may show how far the loop is."""

    def __call__(
        self,
        items: Iterable[Item],
        sizes: Sequence[int],
        description: str,
        unit: str | None = None,
    ) -> Iterable[Item]:
        """Yield the items.

        Args:
            sizes: of each item, in bytes or units.
            unit: what is counted; None is bytes.
        """


def silent(
    items: Iterable[Item], sizes: Sequence[int], description: str, unit: str | None = None
) -> Iterable[Item]:
    """Pass the items on and show nothing."""
    return items
