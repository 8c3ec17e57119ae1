"""The optimizer of a rank: where its states lie, and how many of them."""

from collections.abc import Collection, Sequence
from functools import partial

import torch

from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.optim.offloaded import OffloadedOptimizer
from headrace.trainer.optim.optimizer import optimizer_of
from headrace.trainer.optim.parameter_groups import Stepped
from headrace.trainer.optim.sharded import ShardedOptimizer
from headrace.trainer.parallel import RankLayout


def open_optimizer(
    config: OptimizerConfig,
    trained: Sequence[TrainedParameter],
    layout: RankLayout,
    *,
    triton: bool = False,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer that the config asks for.

    Args:
        triton, tables: as `build_optimizer`.
    """
    plain = partial(optimizer_of, config, triton=triton, tables=tables)

    def build(stepped: Sequence[Stepped]) -> torch.optim.Optimizer:
        if config.offload:
            return OffloadedOptimizer(stepped, plain, layout.device)
        return plain(stepped)

    if config.shard and layout.copies > 1:
        return ShardedOptimizer(trained, build, layout.copies_group)
    return build([Stepped(item, item.parameter) for item in trained])
