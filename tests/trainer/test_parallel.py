"""Ranks that meet over gloo: where they stand, and whom their groups reach."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from ports import free_port

from headrace.schemas.train.parallel_dims import Coordinates, ParallelDims
from headrace.trainer.messages import gather
from headrace.trainer.parallel import RankLayout, connect, transfer_group

RANKS = 4
GROUPS = (
    *("world_group", "replica_group", "pipeline_group", "first_stage_group"),
    *("copies_group", "sequence_group", "tied_group"),
)


def as_rank(rank: int, port: int, neighbors: str, sequence: int = 1) -> dict[str, object]:
    """What one rank sees."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    layout = connect(ParallelDims.of(RANKS, stages=2, sequence=sequence, neighbors=neighbors))
    reached = {
        name: gather(layout.rank, group)
        for name in GROUPS
        if (group := getattr(layout, name)) is not None
    }
    reached["transfers"] = gather(layout.rank, transfer_group(layout, None))
    seen = {
        "rank": layout.rank,
        "place": layout.coordinates,
        "leader": layout.leader,
        "keeps": (layout.keeps_files(node_local=False), layout.keeps_files(node_local=True)),
        "bound": dist.group.WORLD.bound_device_id,
        "reached": reached,
    }
    dist.barrier(layout.world_group)
    dist.destroy_process_group()
    return seen


@pytest.fixture(params=["stages", "replicas"])
def seen(request):
    """What each rank of two stages by two replicas sees, of two machines."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    with context.Pool(RANKS) as pool:
        ranks = [(rank, port, request.param) for rank in range(RANKS)]
        yield request.param, pool.starmap(as_rank, ranks, chunksize=1)


def test_groups_reach_the_ranks_that_the_axes_say(seen):
    neighbors, ranks = seen
    pipelines, copies = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    if neighbors == "replicas":
        pipelines, copies = copies, pipelines
    leaders = [pipeline[0] for pipeline in pipelines]
    for rank, view in enumerate(ranks):
        stage, replica = view["place"][:2]
        assert pipelines[replica][stage] == rank == view["rank"]
        assert view["leader"] == leaders[replica]
        assert view["bound"] is None, "a bound world splits its communicators unequally"
        assert view["reached"] == {
            "world_group": [0, 1, 2, 3],
            "replica_group": pipelines[replica],
            "pipeline_group": pipelines[replica],
            "copies_group": copies[stage],
            "sequence_group": [rank],
            "tied_group": pipelines[replica],
            "transfers": pipelines[replica],
        } | ({"first_stage_group": leaders} if stage == 0 else {})
        on_other_machine = copies[stage][0] // 2 != rank // 2
        assert view["keeps"] == (replica == 0, replica == 0 or on_other_machine)


def test_ranks_that_share_rows_hold_the_same_weights():
    port = free_port()
    with multiprocessing.get_context("fork").Pool(RANKS) as pool:
        ranks = pool.starmap(as_rank, [(r, port, "stages", 2) for r in range(RANKS)], chunksize=1)
    for rank, view in enumerate(ranks):
        stage, number = divmod(rank, 2)
        assert view["place"] == Coordinates(stage=stage, sequence=number)
        shared, pipeline = [[0, 1], [2, 3]][stage], [[0, 2], [1, 3]][number]
        assert view["reached"] == {
            "world_group": [0, 1, 2, 3],
            "replica_group": [0, 1, 2, 3],
            "pipeline_group": pipeline,
            "copies_group": shared,
            "sequence_group": shared,
            "tied_group": pipeline,
            "transfers": pipeline,
        } | ({"first_stage_group": [0]} if rank == 0 else {})
        assert view["leader"] == 0
        assert view["keeps"] == (number == 0, number == 0)


def test_a_process_alone_leads_and_keeps_its_files():
    layout = RankLayout(torch.device("cpu"))
    assert (layout.rank, layout.leads, layout.is_first, layout.is_last) == (0, True, True, True)
    assert layout.coordinates == Coordinates()
    assert layout.keeps_files(node_local=False)
    assert [layout.global_micro_batch(number) for number in range(3)] == [0, 1, 2]
