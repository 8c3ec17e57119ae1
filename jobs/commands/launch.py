"""Starts the ranks of a machine; none outlives the launcher or the failure of another rank.

Why not DeepSpeed's launcher: docs/notes.md, 2026-11-21.
"""

import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass

from headrace.jobs.commands.nodes import Nodes, NodeWatch
from headrace.jobs.commands.ranks import (
    SAVES,
    Rank,
    first_failure,
    kill_all,
    open_rank,
    rank_environment,
)
from headrace.jobs.commands.stalls import Stalls
from headrace.schemas.errors import ConfigError

POLL_SECONDS = 0.1
WAITING_RANKS = 4096  # that may ask for the store before it answers
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Ending:
    """The exit code of a run, and what is said last where it is not 0."""

    code: int
    line: str | None = None


def launch(
    module: str,
    arguments: Sequence[str],
    processes: int,
    master_port: int | None = None,
    nodes: Nodes | None = None,
) -> int:
    """Run `python -m module` as `processes` ranks and wait for all of them.

    SIGTERM, SIGINT, SIGHUP and SIGQUIT reach every rank as SIGTERM, so that it can save and exit,
    SIGUSR1 and SIGUSR2 as SIGUSR1, so that it can save; a second SIGINT kills. When a rank fails,
    the others are killed at once, on other nodes too, and the last line names it.

    Args:
        processes: on this machine.
        master_port: where the ranks meet; None takes a free one.
        nodes: None runs on this machine alone.

    Returns:
        0 when every rank exited with 0, else the code of the first that did not, 128 + n for
        signal n.

    Raises:
        ConfigError: a port is in use.
    """
    store = open_store(nodes, master_port)
    first = nodes.rank * processes if nodes else 0
    command = [sys.executable, "-u", "-m", module, *arguments]
    ranks: list[Rank] = []
    with store or nullcontext(), received_signals() as received:
        port = store.getsockname()[1] if store else 0
        environment = rank_environment(processes, port, nodes)
        with closing(NodeWatch(nodes)) if nodes else nullcontext() as watch:
            try:
                for local in range(processes):
                    fd = store.fileno() if store and first + local == 0 else None
                    ranks.append(open_rank(command, environment, first + local, local, fd))
                if store:
                    store.close()
                ending = wait_for_all(ranks, received, watch)
            finally:
                kill_all(ranks)
    if ending.line:
        sys.stderr.write(f"error: {ending.line}\n")
    return ending.code


def open_store(nodes: Nodes | None, port: int | None) -> socket.socket | None:
    """Listen where the ranks meet: on the loopback interface, or on the one to other nodes.

    Returns:
        A socket for the first rank to serve the store on; None where that rank is not here.

    Raises:
        ConfigError: the port is in use, or not allowed.
    """
    if nodes is not None and nodes.rank:
        return None
    place = (nodes.address(), nodes.port) if nodes else ("127.0.0.1", port or 0)
    try:
        return socket.create_server(place, backlog=WAITING_RANKS)
    except OSError as error:
        raise ConfigError(
            f"--master-port {place[1]}: {error.strerror} on {place[0]}; give another one"
        ) from None


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect each signal that asks for a stop or a save in a list, which is all they do meanwhile.

    One that is ignored stays so: under `nohup` a closed terminal means nothing.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (*STOPS, *SAVES)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for_all(
    ranks: Sequence[Rank], received: list[int], watch: NodeWatch | None = None
) -> Ending:
    """Block until all have exited with 0 or one has failed, passing signals on.

    Args:
        watch: over the other nodes; a run ends where one of them does.
    """
    passed_on = 0
    stalls = Stalls(ranks)
    while True:
        if received.count(signal.SIGINT) > 1:
            return Ending(128 + signal.SIGINT)
        for number in received[passed_on:]:
            passed_on += 1
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1 if number in SAVES else signal.SIGTERM)
        codes = [rank.poll() for rank in ranks]
        if failed := first_failure(ranks):
            if watch is not None:
                watch.fail(failed.blame())
            return Ending(failed.exit_code(), failed.last_line())
        if None not in codes:
            if watch is not None:
                watch.finish()
            return Ending(0)
        if watch is not None and (problem := watch.poll()):
            return Ending(1, problem)
        if stall := stalls.poll():
            sys.stderr.write(f"warning: {stall}\n")
        time.sleep(POLL_SECONDS)
