"""Reporters of a run: who starts it decides how its progress is shown."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from headrace.schemas.shards.manifest import Manifest

logger = logging.getLogger(__name__)


class Bar(Protocol):
    """One pass over the input or the rows, from 0 to its total."""

    def update(self, done: float, counts: str = "") -> None:
        """Move to `done`.

        Args:
            counts: what was counted until then, as text.
        """


class Reporter(Protocol):
    """Told of each pass of a run, and of its end."""

    def bar(self, title: str, total: float) -> AbstractContextManager[Bar]:
        """Open a bar for one pass; `total` is in bytes, or in parts."""

    def line(self, text: str) -> None:
        """Show one line, as that a finished directory is reused."""

    def finished(self, manifest: Manifest) -> None:
        """Show what a finished directory holds."""


class LoggedReporter:
    """Logs the lines and draws nothing: for callers from Python, who are given the manifest."""

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """Open a bar that nobody sees."""
        yield Unseen()

    def line(self, text: str) -> None:
        """Log a line."""
        logger.info("%s", text)

    def finished(self, manifest: Manifest) -> None:
        """Leave the tables out."""


class Unseen:
    """A bar that is not drawn."""

    def update(self, done: float, counts: str = "") -> None:
        """Draw nothing."""
