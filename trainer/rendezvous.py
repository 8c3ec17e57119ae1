"""Meeting of the processes of a run: their environment, the store, the process group."""

import datetime
import os
import socket

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from headrace.schemas.errors import ConfigError
from headrace.trainer.failure import REPORT_VARIABLE

STORE_VARIABLE = "HEADRACE_STORE_FD"  # set by the launcher, for rank 0
TIMEOUT = datetime.timedelta(minutes=30)


def process_environment() -> tuple[int, int, int]:
    """Rank, local rank and world size as the launcher set them; a single process without one."""
    environment = os.environ
    for name, default in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ):
        environment.setdefault(name, default)
    return int(environment["RANK"]), int(environment["LOCAL_RANK"]), int(environment["WORLD_SIZE"])


def local_ranks() -> int:
    """Processes of this run on this machine."""
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ["WORLD_SIZE"]
    )


def open_store(rank: int, world_size: int) -> Store | None:
    """Open the store where the ranks meet; None leaves it to another launcher.

    torch's own listens on all interfaces, for anyone. That of `headrace train` comes as a socket
    that the launcher has bound; without one, the ranks of a single machine meet on its loopback.
    A process alone has nobody to meet.

    Raises:
        ConfigError: the port is in use.
    """
    given = os.environ.pop(STORE_VARIABLE, None)
    if world_size == 1 and given is None:
        return HashStore()  # no port, so that a process may train several times
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    on_loopback = host == "localhost" or host.startswith("127.")
    if REPORT_VARIABLE not in os.environ and (
        not on_loopback or "TORCHELASTIC_USE_AGENT_STORE" in os.environ
    ):
        return None
    listening = int(given) if given else None
    if rank == 0 and listening is None:
        listening = listen(port)
    return TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def listen(port: int) -> int:
    """Listen on a port of the loopback interface; returns the socket's number.

    Raises:
        ConfigError: something else listens there.
    """
    try:
        return socket.create_server(("127.0.0.1", port), backlog=4096).detach()
    except OSError as error:
        raise port_in_use(error) from None


def meet(backend: str, rank: int, world_size: int) -> None:
    """Join the process group of this run.

    Raises:
        ConfigError: something else listens on its port.
    """
    store = open_store(rank, world_size)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise port_in_use(error) from None


def port_in_use(error: Exception) -> ConfigError:
    """Return the line for the user whose port something else has."""
    return ConfigError(
        f"port {os.environ['MASTER_PORT']} is in use on this machine "
        f"({str(error).splitlines()[0]}); set --master-port to a free one, or leave it out"
    )
