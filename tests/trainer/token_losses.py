"""One rank of a forward pass over the first train rows; the last stage writes the token losses."""

import sys
from pathlib import Path

import torch

from headrace.schemas.toml_config import load_config
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.data.course import open_course
from headrace.trainer.data.data_builder import build_train_loader
from headrace.trainer.data.feed import Feed
from headrace.trainer.data.horizon import find_horizon
from headrace.trainer.data.position import Position
from headrace.trainer.distributed import connect, process_environment, set_threads
from headrace.trainer.model.model_builder import build_stage
from headrace.trainer.preflight import check
from headrace.trainer.run.engine import StageEngine


def main(path: Path, output: Path, settings: list[str]) -> None:
    config = load_config(TrainConfig, path, settings)
    _, _, processes = process_environment()
    inputs = check(config, processes)
    layout = connect(config.pipeline_stages)
    set_threads(config)
    built = build_stage(config, layout.stage, layout.device)
    engine = StageEngine([built.stage], config, layout)
    course = open_course(config, inputs, history=[], first_row=0)
    horizon = find_horizon(config, inputs, course, 0, Position())
    feed = Feed(layout, build_train_loader(config, inputs, layout, course, horizon.stop_row))
    engine.forward_only(feed.next())
    if layout.is_last:
        torch.save(torch.cat([o.token_losses for o in engine._outputs]).cpu(), output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
