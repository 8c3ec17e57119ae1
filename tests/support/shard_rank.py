"""One of several ranks that hold the same weights: steps with states shared out, and without."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.schemas.train.optimizers import OPTIMIZERS
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.optim.open_optimizer import open_optimizer
from headrace.trainer.optim.optimizer import set_learning_rate
from headrace.trainer.optim.sharded import ShardedOptimizer
from headrace.trainer.optim.states import averaged, restore, tensors_of
from headrace.trainer.parallel import connect
from headrace.trainer.rendezvous import process_environment

SHAPES = {"a.weight": (97, 33), "b.lora_B.default.weight": (40, 8), "norm": (16,), "tiny": (3,)}
SHARED = [{"shard": True}, {"shard": True, "offload": True}, {"offload": True}]


def fresh():
    """Weights of several sizes, one smaller than a share may be."""
    generator = torch.Generator().manual_seed(0)
    return [
        TrainedParameter(name, nn.Parameter(torch.randn(shape, generator=generator)), owned=True)
        for name, shape in SHAPES.items()
    ]


def run(optimizer, trained, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for number, item in enumerate(trained):
            gradient = torch.randn(item.parameter.shape, generator=generator)
            item.parameter.grad = None if step == 1 and number == 2 else gradient
        if isinstance(optimizer, ShardedOptimizer):  # the sum of what two ranks have found
            for item in trained:
                item.parameter.grad = (
                    None if item.parameter.grad is None else item.parameter.grad / 2
                )
            optimizer.reduce_gradients()
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()
        assert all(item.parameter.grad is None for item in trained)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def compare(kind, layout, how):
    """Steps, states, averages and a resumed run have the bits of an optimizer that holds all."""
    decay = 0.0 if kind == "adam" else 0.1
    settings = {"type": kind, "lr": 1e-2, "weight_decay": decay, "lora_plus_ratio": 2.0}
    plain, shared = OptimizerConfig(**settings), OptimizerConfig(**settings, **how)
    whole, parts = fresh(), fresh()
    one, two = (open_optimizer(c, t, layout) for c, t in ((plain, whole), (shared, parts)))
    run(one, whole, range(3))
    run(two, parts, range(3))
    for own, other in zip(whole, parts, strict=True):
        assert torch.equal(own.parameter, other.parameter), own.name
        assert_same(tensors_of(two, other.parameter), tensors_of(one, own.parameter))
    with averaged(one, whole), averaged(two, parts):
        for own, other in zip(whole, parts, strict=True):
            assert torch.equal(own.parameter, other.parameter), own.name
    resumed = fresh()
    three = open_optimizer(shared, resumed, layout)
    for own, other in zip(whole, resumed, strict=True):
        other.parameter.data.copy_(own.parameter)
        saved = tensors_of(one, own.parameter)
        restore(three, other.parameter, lambda name, shape, saved=saved: saved[name].view(shape))
    run(one, whole, range(3, 5))
    run(three, resumed, range(3, 5))
    for own, other in zip(whole, resumed, strict=True):
        assert torch.equal(own.parameter, other.parameter), own.name


def held_bytes(kind, layout, how):
    """Return the bytes of the states of this rank."""
    trained = fresh()
    optimizer = open_optimizer(OptimizerConfig(type=kind, lr=1.0, **how), trained, layout)
    run(optimizer, trained, range(1))
    states = getattr(optimizer, "inner", optimizer).state.values()
    return sum(v.nbytes for part in states for v in part.values() if v.ndim)


def main(output: Path) -> None:
    _, _, ranks = process_environment()
    layout = connect(ParallelDims(replicas=ranks))
    torch.set_num_threads(1)
    kinds = [kind for kind, record in OPTIMIZERS.items() if record.shardable]
    for kind in kinds:
        for how in SHARED:
            compare(kind, layout, how)
    for kind in ("adafactor", "muon"):
        compare(kind, layout, {"offload": True})
    held = held_bytes("adamw", layout, {"shard": True}) / held_bytes("adamw", layout, {})
    if layout.rank == 0:
        output.write_text(f"{len(kinds)} {held}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
