"""One rank of a training without a model: takes its inputs of every step; the first notes rows."""

import sys
from itertools import chain
from pathlib import Path

import torch.distributed as dist

from headrace.schemas.toml_config import load_config
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.data.course import open_course
from headrace.trainer.data.data_builder import build_train_loader
from headrace.trainer.data.feed import Feed
from headrace.trainer.data.horizon import find_horizon
from headrace.trainer.data.placed_rows import places_in_order, rows_digest
from headrace.trainer.data.position import Position
from headrace.trainer.distributed import connect, gather_objects, process_environment
from headrace.trainer.preflight import check


def main(path: Path, output: Path, settings: list[str]) -> None:
    config = load_config(TrainConfig, path, settings)
    _, _, processes = process_environment()
    inputs = check(config, processes)
    layout = connect(config.pipeline_stages)
    course = open_course(config, inputs, history=[], first_row=0)
    horizon = find_horizon(config, inputs, course, 0, Position())
    feed = Feed(layout, build_train_loader(config, inputs, layout, course, horizon.stop_row))
    digests = []
    for _ in range(horizon.total_steps):
        step = feed.next()
        assert (step.labels is not None) == layout.is_last
        leaders = [part for part in gather_objects(step.leader_rows, layout.world_group) if part]
        digests.append(rows_digest(chain.from_iterable(places_in_order(leaders))))
    if layout.rank == 0:
        output.write_text("\n".join(digests))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
