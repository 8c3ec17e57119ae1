"""One of four stages, without a model: loads parts of 100 epochs of two corpora, notes memory."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch.distributed as dist

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_loader
from headrace.trainer.messages import gather
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.data_plan import plan_data
from headrace.trainer.order.sequences import train_stream
from headrace.trainer.parallel import connect

EPOCHS, BATCHES, MICRO_BATCHES, MEASURED_EVERY = 100, 3, 16, 5
SETTINGS = {
    "model": "none",
    "output_dir": "none",
    "pipeline_stages": 4,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "optimizer": {"lr": 1.0},
}


def main(output: Path, directories: list[Path]) -> None:
    layout = connect(ParallelDims(stages=4))

    def pss() -> int:
        return sum(gather(own_pss(), layout.world_group))

    before = pss()
    lines = []
    for directory in directories:
        feed = Feed(layout, None if layout.rank else open_loader(layout, directory))
        line = []
        for epoch in range(EPOCHS):
            for _ in range(BATCHES):
                inputs = feed.next()
            if epoch % MEASURED_EVERY == MEASURED_EVERY - 1:
                line.append(pss() - before)
        lines.append(line)
        del feed, inputs
    if layout.rank == 0:
        np.savetxt(output, lines)
    dist.barrier(layout.world_group)
    dist.destroy_process_group()


def own_pss() -> int:
    """Bytes of this process's PSS outside libraries, whose share falls to it as others end."""
    maps = psutil.Process().memory_maps()  # pathlib would intern each part of a path, for good
    return sum(area.pss for area in maps if ".so" not in area.path.rpartition("/")[2])


class Excerpts:
    """The first rows of some other part of each epoch of an order."""

    def __init__(self, order, epoch_rows):
        self.order = order
        self.epoch_rows = epoch_rows

    def __getitem__(self, index):
        epoch, row = divmod(index, BATCHES * MICRO_BATCHES)
        return self.order[epoch * self.epoch_rows + epoch * 37 % (self.epoch_rows // 2) + row]


def open_loader(layout, directory):
    """The leader's."""
    manifest = read_manifest(directory)
    config = TrainConfig.model_validate(SETTINGS | {"datasets": [{"path": str(directory)}]})
    plan = plan_data(config, [manifest])
    inputs = SimpleNamespace(
        train=[manifest],
        plan=plan,
        sequence_tokens=manifest.sequence_len,
        capacity=manifest.sequence_len,
    )
    stream = train_stream(config, open_history(config, inputs, [], 0))
    stream = replace(stream, order=Excerpts(stream.order, plan.rows_in(1)))
    return build_loader(config, inputs, layout, stream, MICRO_BATCHES, stop_row=1 << 40)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
