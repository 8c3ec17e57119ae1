"""Entry point of every training process.

Run it through `headrace train`, or `deepspeed --module headrace.trainer.main --config train.toml`.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headrace.schemas.errors import DataError, HeadraceError
from headrace.schemas.process_limits import open_closed_streams
from headrace.schemas.publish import write_atomic
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.run_state import RUN_CONFIG_NAME
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.checkpoint.resume_record import check_run_directory, resume_record
from headrace.trainer.failure import print_mistake, run_rank
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.integrity import verify_shards
from headrace.trainer.preflight import check
from headrace.trainer.quiet import import_without, quiet_libraries
from headrace.trainer.run.run_directory import open_run_directory
from headrace.trainer.run.signals import SignalWatcher

if TYPE_CHECKING:
    from headrace.trainer.parallel import RankLayout

SHARED = ("shards", "model", "config.json")  # what all processes must read alike


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of one training process."""
    parser = argparse.ArgumentParser(
        prog="headrace.trainer.main",
        epilog="example: deepspeed --num_gpus 2 --module headrace.trainer.main --config train.toml",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML config")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--data-changed",
        choices=("refuse", "continue"),
        default="refuse",
        help="on --resume with other datasets, weights, epochs or max_steps than before",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="use so much of each GPU, to try a smaller one"
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help="given by launchers; the environment counts"
    )
    return parser.parse_args(arguments)


def configure_logging(rank: int) -> None:
    """Rank 0 speaks; the others only of trouble, with their rank."""
    shape = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    logging.basicConfig(stream=sys.stdout, format=shape, level=logging.WARNING)
    logging.getLogger("headrace").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def main(
    arguments: list[str] | None = None, complain: Callable[[str], None] = print_mistake
) -> int:
    """Run one training process; returns its exit code.

    Args:
        complain: told of a mistake of the user's.
    """
    open_closed_streams()
    options = parse_arguments(arguments)
    configure_logging(int(os.environ.get("RANK", "0")))
    try:
        config = load_config(TrainConfig, options.config, options.set)
        if options.memory:
            limit_memory(options.memory)
        train(config, resume=options.resume, data_changed=options.data_changed)
    except HeadraceError as error:
        if options.debug:
            raise
        complain(str(error))
        return 1
    return 0


def limit_memory(gib: float) -> None:
    """Let this process take so much of its GPU at the most."""
    from headrace.trainer import devices

    device = devices.take_device(int(os.environ.get("LOCAL_RANK", "0")))
    devices.limit_memory(device, int(gib * 2**30))


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    data_changed: Literal["refuse", "continue"] = "refuse",
) -> Path:
    """Train in this process: alone, or as the one that a launcher's environment says.

    All that can be checked alone is checked first.

    Args:
        resume: continue from the newest checkpoint.
        data_changed: on `resume` with other datasets, weights, epochs or max_steps than before.

    Returns:
        The run directory, `output_dir`.

    Raises:
        HeadraceError: config, data, model or checkpoint are wrong, or a step went wrong; in one
            line that says what to do.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    inputs = check(config, processes)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    writes = local_rank == 0 if config.checkpoint.node_local else rank == 0
    with open_run_directory(Path(config.output_dir), writes=writes):
        check_run_directory(config, inputs, resume, data_changed == "continue")
        if local_rank == 0:  # each machine may have shards of its own
            verify_shards(config, inputs)
        with SignalWatcher(Path(config.output_dir) if rank == 0 else None) as signals:
            connect_and_train(config, inputs, signals, resume=resume)
    return Path(config.output_dir)


def connect_and_train(
    config: TrainConfig, inputs: Inputs, signals: SignalWatcher, *, resume: bool
) -> None:
    """Join the other processes and train with them."""
    quiet_libraries()
    import_without("bitsandbytes", "hqq")

    import torch.distributed as dist

    from headrace.trainer.parallel import connect, set_threads
    from headrace.trainer.run import loop
    from headrace.trainer.run.open_session import open_session

    layout = connect(inputs.dims)
    set_threads(config.threads)
    check_agreement(inputs, layout)
    if layout.publishes(node_local=config.checkpoint.node_local):
        record = {"config": config.model_dump(mode="json"), **resume_record(config, inputs)}
        write_atomic(Path(config.output_dir) / RUN_CONFIG_NAME, json.dumps(record, indent=1) + "\n")
    loop.train(config, inputs, layout, signals, open_session(config, inputs, layout, resume))
    dist.barrier(layout.world_group)
    dist.destroy_process_group()


def check_agreement(inputs: Inputs, layout: "RankLayout") -> None:
    """Machines with disks of their own must hold the same shards and the same model.

    Raises:
        DataError: they do not.
    """
    from headrace.trainer.messages import gather

    mine = (
        inputs.data_fingerprint,
        inputs.weights_fingerprint,
        inputs.model_config_fingerprint,
    )
    for rank, theirs in enumerate(gather(mine, layout.world_group)):
        for what, first, other in zip(SHARED, mine, theirs, strict=True):
            if first != other:
                raise DataError(
                    f"the {what} that rank {rank} reads are not those of rank {layout.rank}; "
                    "copy the same ones to every machine"
                )


if __name__ == "__main__":
    run_rank(lambda complain: main(complain=complain))
