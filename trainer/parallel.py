"""Rank layout: this process's place on the mesh of all ranks, its device and its groups."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headrace.schemas.train.parallel_dims import Coordinates, ParallelDims
from headrace.trainer import devices
from headrace.trainer.rendezvous import TIMEOUT, local_ranks, meet, process_environment

ONE_PROCESS, ORIGIN = ParallelDims(), Coordinates()


@dataclass(frozen=True)
class RankLayout:
    """Place of this process among all; by default that of a process alone, without groups."""

    device: torch.device
    dims: ParallelDims = ONE_PROCESS
    coordinates: Coordinates = ORIGIN
    node: int = 0
    world_group: Any = None  # gloo, all ranks
    replica_group: Any = None  # gloo, all ranks of this replica
    pipeline_group: Any = None  # gloo, the stages of this replica, at the same slice of rows
    first_stage_group: Any = None  # gloo, the data leaders of all replicas
    copies_group: Any = None  # device backend, all ranks that hold the same weights
    sequence_group: Any = None  # device backend, the slices of this replica's rows in this stage
    tensor_group: Any = None  # device backend, the ranks that share the weights of this stage
    tied_group: Any = None  # device backend, first and last stage of a pipeline

    @property
    def rank(self) -> int:
        return self.dims.rank(self.coordinates)

    @property
    def stage(self) -> int:
        return self.coordinates.stage

    @property
    def stages(self) -> int:
        return self.dims.stages

    @property
    def replica(self) -> int:
        return self.coordinates.replica

    @property
    def replicas(self) -> int:
        return self.dims.replicas

    @property
    def copies(self) -> int:
        """Return how many ranks hold the same weights."""
        return self.dims.replicas * self.dims.sequence

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def leads(self) -> bool:
        """Return whether this rank reads the data of its replica."""
        return self.rank == self.leader

    @property
    def leader(self) -> int:
        """Return the rank that reads the data of this replica."""
        return self.dims.rank(Coordinates(replica=self.replica))

    def rank_of(self, stage: int) -> int:
        """Return the rank of another stage at the same place otherwise."""
        return self.dims.rank(self.coordinates._replace(stage=stage))

    def global_micro_batch(self, micro_batch: int) -> int:
        """Return the number in the global batch of this replica's micro-batch."""
        return micro_batch * self.replicas + self.replica

    @property
    def is_first_copy(self) -> bool:
        """Return whether no rank before this one holds the same weights."""
        return not self._copies_before()

    def keeps_files(self, *, node_local: bool) -> bool:
        """Return whether this rank saves its weights: the first that has them, or on each node."""
        if not node_local:
            return self.is_first_copy
        return all(rank // local_ranks() != self.node for rank in self._copies_before())

    @property
    def writes_weights(self) -> bool:
        """Return whether this rank writes what ranks that share weights put together."""
        return self.coordinates.tensor == 0

    def _copies_before(self) -> list[int]:
        """Return the ranks before this one that hold the same weights."""
        (copies,) = (ranks for ranks in self.dims.copies if self.rank in ranks)
        return copies[: copies.index(self.rank)]

    def publishes(self, *, node_local: bool) -> bool:
        """Return whether this rank moves the files of all ranks to their final place."""
        return self.rank % local_ranks() == 0 if node_local else self.rank == 0


def set_threads(wanted: int | None) -> None:
    """CPU threads of this process: the machine's cores are shared by its processes."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(wanted or max(1, cores // local_ranks()))


def connect(dims: ParallelDims) -> RankLayout:
    """Join the process group (NCCL on GPUs, gloo on CPU); all ranks build all groups."""
    rank, local_rank, world_size = process_environment()
    assert world_size == dims.world, "the launcher has checked it"
    device = devices.take_device(local_rank)
    # No device_id: with one, a rank outside a new gloo group still takes part in a split of the
    # NCCL communicator, the members do not, and a later group hangs (torch 2.11 to 2.13). A mesh
    # binds nothing either: it makes its groups one by one unless the world is bound.
    meet(devices.COLLECTIVES[device.type], rank, world_size)
    mesh = make_mesh(dims, device.type)
    control = mesh if not devices.is_accelerator(device) else make_mesh(dims, "cpu")
    coordinates = coordinates_on(mesh)
    return RankLayout(
        device=device,
        dims=dims,
        coordinates=coordinates,
        node=rank // local_ranks(),
        world_group=group_of([list(range(world_size))], "cpu"),
        replica_group=group_of(dims.whole_replicas, "cpu"),
        pipeline_group=control.get_group("stage"),
        first_stage_group=control.get_group("replica")
        if coordinates == Coordinates(replica=coordinates.replica)
        else None,
        copies_group=group_of(dims.copies, device.type),
        sequence_group=mesh.get_group("sequence"),
        tensor_group=mesh.get_group("tensor"),
        tied_group=group_of(ends_of_pipelines(dims), device.type),
    )


def make_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """Lay all ranks out along their axes, with a process group for each line of an axis."""
    return init_device_mesh(
        device_type,
        tuple(dims.axes.values()),
        mesh_dim_names=tuple(dims.axes),
        backend_override={axis: backend_of(device_type) for axis in dims.axes},
    )


def backend_of(device_type: str) -> Any:
    """Return the backend of a device's groups, with the timeout of the run."""
    backend, options = devices.COLLECTIVES[device_type], devices.group_options(device_type, TIMEOUT)
    return backend if options is None else (backend, options)


def coordinates_on(mesh: DeviceMesh) -> Coordinates:
    """Return this rank's place."""
    place, names = mesh.get_coordinate(), mesh.mesh_dim_names
    assert place is not None and names is not None
    return Coordinates(**dict(zip(names, place, strict=True)))


def ends_of_pipelines(dims: ParallelDims) -> list[list[int]]:
    """Return first and last rank of each pipeline; nothing where they are one."""
    return [[line[0], line[-1]] for line in dims.lines("stage")] if dims.stages > 1 else []


def group_of(lists: list[list[int]], device_type: str, options: Any = None) -> Any:
    """Make a group of each list of ranks, and return the one with this rank; None if in none."""
    backend = devices.COLLECTIVES[device_type]
    made = [
        dist.new_group(ranks, backend=backend, timeout=TIMEOUT, pg_options=options)
        for ranks in lists
    ]
    rank = dist.get_rank()
    return next((group for ranks, group in zip(lists, made, strict=True) if rank in ranks), None)


def transfer_group(layout: RankLayout, ctas: int | None) -> Any:
    """A further group of this replica's stages, over the device's backend; all ranks build all.

    Args:
        ctas: on GPUs, how many multiprocessors a transfer may use; None leaves it to NCCL.
    """
    options = devices.group_options(layout.device.type, TIMEOUT, ctas)
    return group_of(layout.dims.lines("stage"), layout.device.type, options)
