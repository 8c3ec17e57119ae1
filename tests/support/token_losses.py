"""One rank of a forward pass over the first train rows; the last stage writes the token losses."""

import sys
from pathlib import Path

import torch
from built_stages import build_stage

from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.parallel import connect, set_threads
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.preflight import check
from headrace.trainer.rendezvous import process_environment


def main(path: Path, output: Path, settings: list[str]) -> None:
    config = load_config(TrainConfig, path, settings)
    _, _, processes = process_environment()
    inputs = check(config, processes)
    layout = connect(inputs.dims)
    set_threads(config.threads)
    built = build_stage(config, layout.stage, layout.device)
    engine = StageEngine([built.stage], config, layout)
    data_history = open_history(config, inputs, history=[], first_row=0)
    run_length = find_run_length(config, inputs, data_history, 0, Position())
    feed = Feed(
        layout, build_train_loader(config, inputs, layout, data_history, run_length.stop_row)
    )
    engine.forward_only(feed.next())
    if layout.is_last:
        torch.save(torch.cat([o.token_losses for o in engine._outputs]).cpu(), output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
