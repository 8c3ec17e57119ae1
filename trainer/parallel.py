"""Rank layout: this process's stage, replica and device, and its process groups."""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.failure import REPORT_VARIABLE

T = TypeVar("T")

STORE_VARIABLE = "HEADRACE_STORE_FD"  # set by the launcher, for rank 0
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class RankLayout:
    """Place of this process.

    A replica's stages are neighbors, rank = replica * stages + stage, or with `columns` the
    replicas of a stage are, rank = stage * replicas + replica.
    """

    rank: int
    stage: int
    stages: int
    replica: int
    replicas: int
    device: torch.device
    world_group: Any  # gloo, all ranks
    pipeline_group: Any  # gloo, the stages of this replica
    first_stage_group: Any  # gloo, the first stages of all replicas
    replicas_group: Any  # device backend, the same stage of all replicas
    tied_group: Any  # device backend, first and last stage of this replica
    node: int = 0
    columns: bool = False

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def rank_of(self, stage: int, replica: int | None = None) -> int:
        """The global rank of a stage, of this replica if not of another."""
        replica = self.replica if replica is None else replica
        return place_of(stage, replica, self.stages, self.replicas, columns=self.columns)

    def keeps_files(self, *, node_local: bool) -> bool:
        """Return whether this rank saves its stage: the first of its replicas, or on each node."""
        if not node_local:
            return self.replica == 0
        return all(
            place_of(self.stage, replica, self.stages, self.replicas, columns=self.columns)
            // local_ranks()
            != self.node
            for replica in range(self.replica)
        )

    def publishes(self, *, node_local: bool) -> bool:
        """Return whether this rank moves the files of all ranks to their final place."""
        return self.rank % local_ranks() == 0 if node_local else self.rank == 0


def place_of(stage: int, replica: int, stages: int, replicas: int, *, columns: bool) -> int:
    """The global rank of a stage of a replica."""
    return stage * replicas + replica if columns else replica * stages + stage


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


def set_threads(config: TrainConfig) -> None:
    """CPU threads of this process: the machine's cores are shared by its processes."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // local_ranks()))


def open_store(rank: int, world_size: int) -> Store | None:
    """Open the store where the ranks meet; None leaves it to another launcher.

    torch's own listens on all interfaces, for anyone. That of `headrace train` comes as a socket
    that the launcher has bound; without one, the ranks of a single machine meet on its loopback.

    Raises:
        ConfigError: the port is in use.
    """
    given = os.environ.pop(STORE_VARIABLE, None)
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


def connect(stages: int, *, columns: bool = False) -> RankLayout:
    """Join the process group (NCCL on GPUs, gloo on CPU); all ranks build all groups."""
    rank, local_rank, world_size = process_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # No device_id: with one, a rank outside a new gloo group still takes part in a split of the
    # NCCL communicator, the members do not, and a later group hangs (torch 2.11 to 2.13).
    meet(backend, rank, world_size)
    replicas = world_size // stages
    if columns:
        stage, replica = divmod(rank, replicas)
    else:
        replica, stage = divmod(rank, stages)

    def place(stage: int, replica: int) -> int:
        return place_of(stage, replica, stages, replicas, columns=columns)

    def group(lists: list[list[int]], kind: str) -> Any:
        made = [(ranks, dist.new_group(ranks, backend=kind, timeout=TIMEOUT)) for ranks in lists]
        return next((handle for ranks, handle in made if rank in ranks), None)

    pipelines = [[place(s, r) for s in range(stages)] for r in range(replicas)]
    same_stage = [[place(s, r) for r in range(replicas)] for s in range(stages)]
    ends = [[ranks[0], ranks[-1]] for ranks in pipelines] if stages > 1 else []
    return RankLayout(
        rank=rank,
        stage=stage,
        stages=stages,
        replica=replica,
        replicas=replicas,
        device=device,
        world_group=group([list(range(world_size))], "gloo"),
        pipeline_group=group(pipelines, "gloo"),
        first_stage_group=group(same_stage[:1], "gloo"),
        replicas_group=group(same_stage, backend),
        tied_group=group(ends, backend),
        node=rank // local_ranks(),
        columns=columns,
    )


def transfer_group(layout: RankLayout, ctas: int | None) -> Any:
    """A further group of this replica's stages, over the device's backend; all ranks build all.

    Args:
        ctas: on GPUs, how many multiprocessors a transfer may use; None leaves it to NCCL.
    """
    on_gpu = layout.device.type == "cuda"
    mine = None
    for replica in range(layout.replicas):
        options: Any = None
        if on_gpu:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            options.config.max_ctas = options.config.max_ctas if ctas is None else ctas
        ranks = [layout.rank_of(stage, replica) for stage in range(layout.stages)]
        group = dist.new_group(
            ranks, backend="nccl" if on_gpu else "gloo", timeout=TIMEOUT, pg_options=options
        )
        mine = group if replica == layout.replica else mine
    return mine


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Each member's value, in rank order, at every member."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_at_first(value: T, layout: RankLayout) -> list[T]:
    """Each rank's value, in rank order, at the first rank; nothing at the others."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if layout.rank == 0 else None
    dist.gather_object(value, gathered, dst=0, group=layout.world_group)
    return gathered or []


def from_first_rank(compute: Callable[[], T], layout: RankLayout) -> T:
    """A value that the first rank works out for all."""
    values = [compute() if layout.rank == 0 else None]
    dist.broadcast_object_list(values, src=0, group=layout.world_group)
    return values[0]  # type: ignore[return-value]
