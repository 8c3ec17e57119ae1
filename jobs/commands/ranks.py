"""The processes of a run as the launcher sees them: alive or ended, and what they tell it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

LONGEST_LINE = 1 << 16


@dataclass
class Rank:
    """One process of the run.

    It stays uncollected until its process group is killed, so that its number is nobody else's.

    Attributes:
        reports: the reading end of a pipe: a JSON object a line, as `headrace.trainer.failure`
            writes them.
        code: its exit code, negative for a signal; None while it runs.
        told: the fields of its last objects.
        heard: when it last told anything.
        moved: when it was last seen to go on.
    """

    number: int
    process: subprocess.Popen[bytes]
    reports: int
    code: int | None = None
    told: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    unread: bytes = b""

    @property
    def pid(self) -> int:
        """Return the number of its process, and of its process group."""
        return self.process.pid

    def poll(self) -> int | None:
        """Read what it tells, and return its exit code if it has ended."""
        if self.code is None:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                exited = ended.si_code == os.CLD_EXITED
                self.code = ended.si_status if exited else -ended.si_status
        self._listen()
        return self.code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def has_failed(self) -> bool:
        """Return whether it ended with an error, or without one in the middle of its work."""
        left = self.code == 0 and bool(self.told) and not self.told.get("done")
        return bool(self.code) or left

    def exit_code(self) -> int:
        """Return the launcher's exit code for its failure: 128 + n for signal n."""
        assert self.code is not None
        return 128 - self.code if self.code < 0 else self.code or 1

    def last_line(self) -> str:
        """Say why it failed: a mistake of the user's as it is, anything else with its number."""
        return str(self.told.get("mistake") or self.blame())

    def blame(self) -> str:
        """Say that it failed, and why."""
        code = self.code or 0
        if code < 0:
            hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
            return f"rank {self.number} was ended by {signal.Signals(-code).name}{hint}"
        why = self.told.get("mistake") or self.told.get("error")
        if code == 0:
            return f"rank {self.number} left with code 0 before its work was done"
        return f"rank {self.number} failed with code {code}{f': {why}' if why else ''}"

    def _listen(self) -> None:
        try:
            while received := os.read(self.reports, 1 << 12):
                self.unread += received
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread[-LONGEST_LINE:].split(b"\n")
        for line in lines:
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        self.heard = time.monotonic()
        try:
            told = json.loads(line)
        except ValueError:
            return  # the first part of it was cut off
        self.told |= told
        self.moved = self.heard - told.get("still", 0.0)


def open_reports() -> tuple[int, int]:
    """Open a pipe for a rank's reports; returns the ends to read and to write."""
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    os.set_blocking(writes, False)
    return reads, writes


def first_failure(ranks: Sequence[Rank]) -> Rank | None:
    """Return the rank that failed, of several the one that said so first."""
    failed = [rank for rank in ranks if rank.has_failed]
    return min(failed, key=lambda rank: rank.told.get("failed_at", float("inf")), default=None)


def kill_all(ranks: Sequence[Rank]) -> None:
    """Kill the ranks that still run, and whatever processes the ranks of a failed run started."""
    if any(rank.code != 0 or rank.has_failed for rank in ranks):
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
        os.close(rank.reports)
