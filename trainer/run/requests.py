"""Requests to a run while it runs: by signals to any rank, by files in its directory."""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SAVE_FILE = "save"
SAVE_AND_QUIT_FILE = "save_quit"


@dataclass(frozen=True)
class Wishes:
    """Requests that one rank has received since it was last asked."""

    save: bool
    stop: bool


class Requests:
    """SIGTERM and SIGINT: save and stop after the step. SIGUSR1: save. The files mean the same.

    Each rank hears for itself; ranks act on what all of them have told each other. A second SIGINT
    ends the process at once.

    Args:
        directory: where the files are looked for; None at every rank but the first, so that no two
            ranks see different things.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._save = False
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)

    def poll(self) -> Wishes:
        """Return the requests so far; a save is returned once, a stop stays."""
        quit_file = self._taken(SAVE_AND_QUIT_FILE)
        self._stop = self._stop or quit_file
        wishes = Wishes(save=self._save or self._taken(SAVE_FILE), stop=self._stop)
        self._save = False
        return wishes

    def _taken(self, name: str) -> bool:
        """Remove a file of this name, and return whether it was there."""
        if self._directory is None:
            return False
        try:
            (self._directory / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
