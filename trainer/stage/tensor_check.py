"""Tries out whether the weights of a model can be cut among ranks, each rank a thread of this one.

A tiny model of the same kind is trained on one row of documents, once whole and once in two parts,
as two ranks would. Losses and gradients must be the same.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.stage import Stage
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard
from headrace.trainer.tensor_parallel.weight_cut import StageCuts

RANKS = 2
TOLERANCE = 1e-5  # relative, of losses and of the whole gradient
DOCUMENTS = [5, 11, 8]
TOKENS = sum(DOCUMENTS)
VOCABULARY = 96  # of the tiny model; the ranks divide it


@dataclass(frozen=True)
class Exchange:
    """A place where threads leave tensors for each other."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS))
    left: list[Tensor | None] = field(default_factory=lambda: [None] * RANKS)

    def all(self, rank: int, mine: Tensor) -> list[Tensor]:
        """Return what all threads bring to the same call, in order."""
        self.left[rank] = mine
        self.barrier.wait()
        found = [tensor for tensor in self.left if tensor is not None]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadShard(TensorShard):
    """A rank that is a thread; `group` is the `Exchange`."""

    def all_reduce(self, tensor: Tensor, *, largest: bool = False) -> Tensor:
        stacked = torch.stack(self.all_gather(tensor))
        return stacked.amax(dim=0) if largest else stacked.sum(dim=0).to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.group.all(self.rank, tensor.detach())
        return found


@dataclass(frozen=True)
class TinyPart:
    """A part of a tiny model, and what of its weights it is."""

    stage: Stage
    cuts: StageCuts


@dataclass(frozen=True)
class Found:
    """Result of a step: the loss, and gradients by the weights' names."""

    loss: Tensor
    gradients: Mapping[str, Tensor]


def find_difference(build: Callable[[TensorShard], TinyPart]) -> float:
    """Return the largest relative difference of loss and gradients between parts and whole.

    Args:
        build: the whole of a tiny model with the part of its weights that a rank would hold, the
            same each time, in evaluation mode.
    """
    expected = step(build(WHOLE_WEIGHTS).stage)
    exchange = Exchange()
    parts = [build(ThreadShard(rank, RANKS, exchange)) for rank in range(RANKS)]

    def run(part: TinyPart) -> Found:
        try:
            return step(part.stage)
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(RANKS) as pool:
        found = [future.result() for future in [pool.submit(run, part) for part in parts]]
    differences = [(part.loss - expected.loss).abs() / expected.loss.abs() for part in found]
    norm = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        for part, other in zip(parts, found, strict=True):
            own = other.gradients[name]
            if name in part.cuts.partial:
                own = torch.stack([result.gradients[name] for result in found]).sum(dim=0)
            differences.append((own - part.cuts.part(name, gradient)).norm() / norm)
    return torch.stack(differences).max().item()


def step(stage: Stage) -> Found:
    """Train on one row, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[0, torch.tensor(DOCUMENTS).cumsum(0) - 1] = IGNORED_LABEL
    batch = MicroBatch([DOCUMENTS], [TOKENS], labels, 1 / TOKENS, 1.0, seed=0)
    output = stage(ids, batch)
    output.value.backward()
    weights = stage.canonical_parameters()
    return Found(output.value.detach(), {n: gradient_of(weight) for n, weight in weights.items()})


def gradient_of(weight: Tensor) -> Tensor:
    """Return a weight's gradient, zeros where nothing used it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
