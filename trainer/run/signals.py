"""Requests to a run while it runs: by signals to any rank, by files in its directory."""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SAVE_FILE = "save"
SAVE_AND_QUIT_FILE = "save_quit"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
SAVES = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class StopOrSave:
    """Requests that one rank has received since it was last asked."""

    save: bool
    stop: bool


class SignalWatcher:
    """SIGTERM, SIGINT, SIGHUP, SIGQUIT: save and stop after the step. SIGUSR1, SIGUSR2: save.

    The files mean the same. SIGHUP is left ignored where it is, as under `nohup`. Each rank hears
    for itself; ranks act on what all of them have told each other. A second SIGINT ends the process
    at once.

    Args:
        directory: where the files are looked for; None at every rank but the first, so that no two
            ranks see different things.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._save = False
        self._stop = False
        self._before: dict[int, Any] = {}
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_stop)
        for number in SAVES:
            self._before[number] = signal.signal(number, self._on_save)

    def __enter__(self) -> "SignalWatcher":
        return self

    def __exit__(self, *error: object) -> None:
        """Let signals mean what they meant before, for a process that goes on."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> StopOrSave:
        """Return the requests so far; a save is returned once, a stop stays."""
        quit_file = self._taken(SAVE_AND_QUIT_FILE)
        self._stop = self._stop or quit_file
        stop_or_save = StopOrSave(save=self._save or self._taken(SAVE_FILE), stop=self._stop)
        self._save = False
        return stop_or_save

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
