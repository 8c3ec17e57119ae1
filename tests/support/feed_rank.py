"""One rank of a training without a model: takes its inputs of every step; the first notes rows."""

import sys
from itertools import chain
from pathlib import Path

import torch.distributed as dist

from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.messages import gather
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.parallel import connect
from headrace.trainer.preflight import check
from headrace.trainer.rendezvous import process_environment
from headrace.trainer.shards.packed_rows import places_in_order, rows_digest


def main(path: Path, output: Path, settings: list[str]) -> None:
    config = load_config(TrainConfig, path, settings)
    _, _, processes = process_environment()
    inputs = check(config, processes)
    layout = connect(inputs.dims)
    data_history = open_history(config, inputs, history=[], first_row=0)
    run_length = find_run_length(config, inputs, data_history, 0, Position())
    feed = Feed(
        layout, build_train_loader(config, inputs, layout, data_history, run_length.stop_row)
    )
    reading = gather(feed.loader is not None, layout.world_group)
    assert sum(reading) == layout.replicas, "one loader for each replica, whoever shares its rows"
    digests = []
    for _ in range(run_length.total_steps):
        step = feed.next()
        assert (step.labels is not None) == layout.is_last
        leaders = [part for part in gather(step.leader_rows, layout.world_group) if part]
        digests.append(rows_digest(chain.from_iterable(places_in_order(leaders))))
    if layout.rank == 0:
        output.write_text("\n".join(digests))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
