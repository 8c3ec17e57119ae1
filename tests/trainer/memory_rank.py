"""One of four stages, without a model: loads parts of 100 epochs of two corpora, notes memory."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from sparse import make_sparse

from headrace.schemas.train_config import TrainConfig
from headrace.trainer.course import open_course
from headrace.trainer.data_builder import build_train_loader
from headrace.trainer.data_plan import plan_data
from headrace.trainer.distributed import connect, gather_objects
from headrace.trainer.feed import Feed
from headrace.trainer.position import Position

EPOCHS, BATCHES = 100, 3
SHARDS = (4, 400)  # 16.8 million tokens, and 100 times as many
SETTINGS = {
    "model": "none",
    "output_dir": "none",
    "pipeline_stages": 4,
    "gradient_accumulation_steps": 16,
    "optimizer": {"lr": 1.0},
}


def main(folder: Path, output: Path) -> None:
    layout = connect(4)

    def pss() -> int:
        mine = psutil.Process().memory_full_info().pss
        return sum(gather_objects(mine, layout.world_group))

    gather_objects(np.zeros(1), layout.world_group)
    if layout.rank == 0:
        make_sparse(folder / "warm", 1)
    before = pss()
    lines = []
    for shards in SHARDS:
        directory = folder / str(shards)
        config = TrainConfig.model_validate(SETTINGS | {"datasets": [{"path": str(directory)}]})
        feed = Feed(layout, None if layout.rank else open_loader(config, layout, directory, shards))
        epoch_rows = shards * 4 * 256
        line = []
        for epoch in range(EPOCHS):
            if feed.loader is not None:
                first = epoch * epoch_rows + epoch * 37 % (epoch_rows // 2)
                feed.loader.seek(Position(first))
            for _ in range(BATCHES):
                inputs = feed.next()
            line.append(pss() - before)
        lines.append(line)
        del feed, inputs
    if layout.rank == 0:
        np.savetxt(output, lines)


def open_loader(config, layout, directory, shards):
    """The leader's."""
    manifest = make_sparse(directory, shards)
    plan = plan_data(config, [manifest])
    inputs = SimpleNamespace(train=[manifest], plan=plan, place_tokens=manifest.sequence_len)
    return build_train_loader(
        config, inputs, layout, open_course(config, inputs, [], 0), stop_row=1 << 40
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
