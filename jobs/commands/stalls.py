"""Notices that a run stands still, and names the rank that the others wait for."""

import time
from collections.abc import Sequence

from headrace.jobs.commands.ranks import Rank

STILL_SECONDS = 60.0  # in which no rank was seen to go on
DEAF_SECONDS = 15.0  # a rank tells where it is every few seconds


class Stalls:
    """Says so when no rank has moved for a minute, then after two, four, ..."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        still_seconds: float = STILL_SECONDS,
        deaf_seconds: float = DEAF_SECONDS,
    ) -> None:
        self.ranks = ranks
        self.still_seconds, self.deaf_seconds = still_seconds, deaf_seconds
        self.patience = still_seconds

    def poll(self) -> str | None:
        """Return what to tell, once for each doubling of the time."""
        running = [rank for rank in self.ranks if rank.code is None]
        if not running or not all(rank.told for rank in running):
            return None  # still importing, or a program that does not tell
        still = time.monotonic() - max(rank.moved for rank in running)
        if still < self.still_seconds:
            self.patience = self.still_seconds
        if still < self.patience:
            return None
        self.patience *= 2
        return describe(running, still, self.deaf_seconds)


def describe(ranks: Sequence[Rank], still: float, deaf_seconds: float) -> str:
    """Name the ranks that do not wait for others, and where the others wait."""
    now = time.monotonic()
    deaf = [rank for rank in ranks if now - rank.heard > deaf_seconds]
    busy = [rank for rank in ranks if rank not in deaf and not rank.told.get("waits")]
    waiting = [rank for rank in ranks if rank not in deaf and rank not in busy]
    parts = [f"rank {rank.number} does not answer: {state_of(rank)}" for rank in deaf]
    parts += [f"rank {rank.number} is {rank.told.get('at')}" for rank in busy]
    parts += [f"rank {rank.number} waits {rank.told.get('at')}" for rank in waiting]
    return f"nothing has moved for {still:.0f} s; {'; '.join(parts)}"


def state_of(rank: Rank) -> str:
    """Return the state of a process in the system's word, such as `stopped` or `disk-sleep`."""
    import psutil

    try:
        return f"process {rank.pid} is {psutil.Process(rank.pid).status()}"
    except psutil.Error:
        return f"process {rank.pid} is gone"
