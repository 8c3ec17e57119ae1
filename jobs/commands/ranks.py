"""The processes of a run: their environment, their start, and what they tell the launcher."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from headrace.jobs.commands.machine import card_names, prepare_transfers
from headrace.jobs.commands.nodes import Nodes

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
PR_SET_PDEATHSIG = 1  # prctl(2)
SAVES = (signal.SIGUSR1, signal.SIGUSR2)
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


def rank_environment(
    processes: int, port: int, nodes: Nodes | None = None, cards: Sequence[str] | None = None
) -> dict[str, str]:
    """Return what torch.distributed and DeepSpeed read, less the rank itself.

    Ranks of one machine talk over its loopback interface, those of several over the one that leads
    to node 0; left alone, gloo takes the one that the host name resolves to, which may lead
    nowhere. torch's own log tells of each first transfer between two GPUs; its errors stay.

    Args:
        cards: names of the GPUs; None asks the driver.
    """
    interface = nodes.interface() if nodes else LOOPBACK
    return {
        **prepare_transfers(processes, os.environ, card_names() if cards is None else cards),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        "WORLD_SIZE": str(processes * (nodes.count if nodes else 1)),
        "LOCAL_WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": nodes.master if nodes else "127.0.0.1",
        "MASTER_PORT": str(nodes.port if nodes else port),
    }


def open_rank(
    command: Sequence[str],
    environment: dict[str, str],
    number: int,
    local_rank: int,
    store: int | None,
) -> Rank:
    """Start one rank, with a pipe for what it tells the launcher, and the store's socket."""
    reports, writes = open_reports()
    fds = {"HEADRACE_REPORT_FD": writes}
    if store is not None:
        fds["HEADRACE_STORE_FD"] = store
    environment = environment | {name: str(fd) for name, fd in fds.items()}
    try:
        process = start_rank(command, environment, number, local_rank, tuple(fds.values()))
    finally:
        os.close(writes)
    return Rank(number, process, reports)


def start_rank(
    command: Sequence[str],
    environment: dict[str, str],
    rank: int,
    local_rank: int,
    fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start one rank in its own process group, so that Ctrl-C comes once, through the launcher."""
    return subprocess.Popen(
        command,
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
        stdin=subprocess.DEVNULL,
        process_group=0,
        pass_fds=fds,
        preexec_fn=die_with(os.getpid()),
    )


def die_with(launcher: int) -> Callable[[], None]:
    """Return a function for a rank to run first: it asks Linux to kill it with the launcher.

    It also ignores requests to save until the rank has installed its handler.
    """
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        for number in SAVES:
            signal.signal(number, signal.SIG_IGN)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it went between fork and prctl
            os._exit(1)

    return prepare


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
