"""Inputs reach the GPU from pinned memory, without the host waiting, and arrive as they were."""

import pytest
import torch
import torch.distributed as dist
from loaders import open_loader, open_stream

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.batches.feed import Feed
from headrace.trainer.layers.device import to_device
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.parallel import RankLayout
from headrace.trainer.shards.row_groups import list_row_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def feed(tiny_shards):
    """Of a single stage, in a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    manifest = read_manifest(tiny_shards)
    order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
    loader = open_loader(open_stream(tiny_shards, manifest, order), 1 << 20, 64, prefetch=2)
    yield Feed(RankLayout(torch.device("cuda"), first_stage_group=dist.group.WORLD), loader)
    dist.destroy_process_group()


def test_batches_are_pinned_and_their_copies_are_not_waited_for(feed):
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    for _ in range(20):
        inputs = feed.next()
        for host in (inputs.input_ids, inputs.labels):
            assert host.is_pinned()
            assert all(micro_batch.is_pinned() for micro_batch in host)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                copies = [to_device(micro_batch, device).long() for micro_batch in host]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(torch.stack(copies).cpu(), host.long())


def test_a_copy_runs_while_the_host_goes_on(feed):
    """A copy behind a kernel of some seconds is asked for at once, and done after it."""
    device = torch.device("cuda")
    ids = feed.next().input_ids
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    copy, done = to_device(ids, device), torch.cuda.Event()
    done.record()
    assert not done.query(), "the host has waited for the device"
    torch.cuda.synchronize()
    assert torch.equal(copy.cpu(), ids)
