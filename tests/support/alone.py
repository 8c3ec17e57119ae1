"""A layout of one process, for what asks the other ranks."""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from headrace.trainer.parallel import RankLayout


@contextmanager
def layout_of_one():
    """One stage, one replica, on CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    try:
        yield RankLayout(
            device=torch.device("cpu"),
            world_group=group,
            pipeline_group=group,
            first_stage_group=group,
            replica_group=group,
            copies_group=group,
        )
    finally:
        dist.destroy_process_group()
