"""Starts the ranks of one machine; none outlives the launcher or the failure of another rank.

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

from headrace.jobs.nodes import Heartbeat, Node

logger = logging.getLogger(__name__)

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
PR_SET_PDEATHSIG = 1  # prctl(2)
POLL_SECONDS = 0.1
NODE_LOST = 75  # EX_TEMPFAIL: worth another try


def launch(
    module: str,
    arguments: Sequence[str],
    processes: int,
    master_port: int | None = None,
    node: Node | None = None,
) -> int:
    """Run `python -m module` as `processes` ranks and wait for all of them.

    SIGTERM and SIGINT reach every rank as SIGTERM, so that it can save and exit, SIGUSR1 as it is,
    so that it can save; a second SIGINT kills. When a rank fails, the others are killed at once.

    Args:
        master_port: where the ranks meet; None takes a free one.
        node: this machine among several, each with so many ranks.

    Returns:
        0 when every rank exited with 0, else the code of the first that did not, 128 + n for
        signal n.
    """
    if node is None:
        environment = rank_environment(processes, master_port or free_port())
    else:
        environment = node_environment(processes, node)
    heartbeat = None if node is None else Heartbeat(node)
    first = 0 if node is None else node.number * processes
    code = 1
    command = [sys.executable, "-u", "-m", module, *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    with received_signals() as received:
        try:
            for local_rank in range(processes):
                ranks.append(start_rank(command, environment, first + local_rank, local_rank))
            code = wait_for_all(ranks, received, heartbeat)
            return code
        finally:
            kill_all(ranks)
            if heartbeat is not None:
                heartbeat.close(farewell=code == 0)


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


def rank_environment(processes: int, port: int) -> dict[str, str]:
    """What torch.distributed and DeepSpeed read, less the rank itself.

    All ranks are on this machine, so they talk over the loopback interface; left alone, gloo takes
    the one that the host name resolves to, which may lead nowhere. torch's own log tells of each
    first transfer between two GPUs; its errors stay.
    """
    return {
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def node_environment(processes: int, node: Node) -> dict[str, str]:
    """The same for one of several machines; interfaces are found, or named by the environment."""
    environment = {**rank_environment(processes, node.port), **node.environment(processes)}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name not in os.environ:
            del environment[name]
    return environment


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
    """What a rank does first: ask Linux to kill it when the launcher is gone, however it went.

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
    heartbeat: Heartbeat | None = None,
) -> int:
    """Block until all have exited with 0 or one has failed, passing signals on."""
    passed_on = 0
    while True:
        if received.count(signal.SIGINT) > 1:
            return 128 + signal.SIGINT
        for number in received[passed_on:]:
            passed_on += 1
            for process in ranks:
                process.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code != 0:
                return report(rank, code)
        if None not in codes:
            return 0
        if heartbeat is not None and heartbeat.lost is not None:
            logger.error(
                "error: %s; the ranks here were ended; continue on all nodes with --resume",
                heartbeat.lost,
            )
            return NODE_LOST
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
