"""Starts the ranks of a machine; none outlives the launcher or the failure of another rank.

Why not DeepSpeed's launcher: docs/notes.md, 2026-11-21.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from headrace.jobs.nodes import Nodes, NodeWatch

logger = logging.getLogger(__name__)

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
PR_SET_PDEATHSIG = 1  # prctl(2)
POLL_SECONDS = 0.1


def launch(
    module: str,
    arguments: Sequence[str],
    processes: int,
    master_port: int | None = None,
    nodes: Nodes | None = None,
) -> int:
    """Run `python -m module` as `processes` ranks and wait for all of them.

    SIGTERM and SIGINT reach every rank as SIGTERM, so that it can save and exit, SIGUSR1 as it is,
    so that it can save; a second SIGINT kills. When a rank fails, the others are killed at once,
    on other nodes too.

    Args:
        processes: on this machine.
        master_port: where the ranks meet; None takes a free one.
        nodes: None runs on this machine alone.

    Returns:
        0 when every rank exited with 0, else the code of the first that did not, 128 + n for
        signal n.
    """
    environment = rank_environment(processes, master_port or free_port(), nodes)
    first = nodes.rank * processes if nodes else 0
    command = [sys.executable, "-u", "-m", module, *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    watch = NodeWatch(nodes) if nodes else None
    with received_signals() as received:
        try:
            for local_rank in range(processes):
                ranks.append(start_rank(command, environment, first + local_rank, local_rank))
            return wait_for_all(ranks, received, first, watch)
        finally:
            kill_all(ranks)
            if watch is not None:
                watch.close()


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list that grows by each SIGTERM, SIGINT and SIGUSR1, which do nothing else meanwhile."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def rank_environment(processes: int, port: int, nodes: Nodes | None = None) -> dict[str, str]:
    """Return the variables that torch.distributed and DeepSpeed read, less the rank itself.

    Ranks of one machine talk over its loopback interface, those of several over the one that leads
    to node 0; left alone, gloo takes the one that the host name resolves to, which may lead
    nowhere. torch's own log tells of each first transfer between two GPUs; its errors stay.
    """
    interface = nodes.interface() if nodes else LOOPBACK
    return {
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


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(
    command: Sequence[str], environment: dict[str, str], rank: int, local_rank: int
) -> subprocess.Popen[bytes]:
    """Start one rank in its own process group, so that Ctrl-C comes once, through the launcher."""
    return subprocess.Popen(
        command,
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=die_with(os.getpid()),
    )


def die_with(launcher: int) -> Callable[[], None]:
    """Return a function for a rank to run first: it asks Linux to kill it when the launcher is
    gone. It also ignores SIGUSR1 until the rank has installed its handler.

    And not to die of a wish to save that comes before it listens.
    """
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it went between fork and prctl
            os._exit(1)

    return prepare


def wait_for_all(
    ranks: Sequence[subprocess.Popen[bytes]],
    received: list[int],
    first: int = 0,
    watch: NodeWatch | None = None,
) -> int:
    """Block until all have exited with 0 or one has failed, passing signals on.

    Args:
        first: the number of the first of these ranks among those of all nodes.
        watch: over the other nodes; a run ends where one of them does.
    """
    passed_on = 0
    while True:
        if received.count(signal.SIGINT) > 1:
            return 128 + signal.SIGINT
        for number in received[passed_on:]:
            passed_on += 1
            for process in ranks:
                process.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes, first):
            if code is not None and code != 0:
                if watch is not None:
                    watch.fail(f"rank {rank} ended with code {code}")
                return report(rank, code)
        if None not in codes:
            if watch is not None:
                watch.finish()
            return 0
        if watch is not None and (problem := watch.poll()):
            sys.stderr.write(f"error: {problem}\n")
            return 1
        time.sleep(POLL_SECONDS)


def report(rank: int, code: int) -> int:
    """The exit code for a failed rank; one that was killed has not said why, so this does."""
    if code > 0:
        return code
    name = signal.Signals(-code).name
    hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
    logger.error("rank %d was ended by %s%s", rank, name, hint)
    return 128 - code


def kill_all(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks that still run, with whatever processes they started."""
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
