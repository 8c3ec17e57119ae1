"""The order of work in a pipeline that fills and drains in less than the time of whole stages.

Interleaved 1F1B: chunk c of stage s is part c * stages + s of the model, so a micro-batch goes
round all stages as often as there are chunks. A stage starts after the time of a chunk, not of a
whole stage, and the pipeline fills and drains in so much less. Narayanan et al. 2021, section 2.2:
https://arxiv.org/abs/2104.04473

Sliced 1F1B: every row goes through in slices, and a stage starts after the time of a slice. It
holds slices where it would hold whole micro-batches. The backward passes of a micro-batch begin
with its last slice, from which all earlier ones' keys and values take gradients.
https://arxiv.org/abs/2406.03488
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import TypeAlias


@dataclass(frozen=True)
class Pass:
    """One micro-batch, or a slice of its rows, through one part of the model."""

    is_forward: bool
    part: int
    micro_batch: int
    row_slice: int = 0

    @property
    def before(self) -> "Pass":
        """Return the pass whose result this one needs; there is none at the ends of the model."""
        part = self.part - 1 if self.is_forward else self.part + 1
        return Pass(self.is_forward, part, self.micro_batch, self.row_slice)

    @property
    def reverse(self) -> "Pass":
        """Return the backward pass of a forward one, and the other way round."""
        return Pass(not self.is_forward, self.part, self.micro_batch, self.row_slice)

    @property
    def next_part(self) -> int:
        """Return the part that needs its result; it does not exist at the ends of the model."""
        return self.part + 1 if self.is_forward else self.part - 1


@dataclass(frozen=True)
class Send:
    """Hand what a pass has made to another stage, without waiting for it."""

    made_by: Pass
    stage: int


@dataclass(frozen=True)
class Receive:
    """Be ready for what a pass makes on another stage. The pass that needs it waits for it."""

    made_by: Pass
    stage: int


Instruction: TypeAlias = Pass | Send | Receive


def schedule(
    stages: int, chunks: int, micro_batches: int, *, trains: bool
) -> list[list[Instruction]]:
    """Return the instructions of each stage, in order.

    Args:
        trains: backward passes too.
    """
    ordered = [passes(stage, stages, chunks, micro_batches, trains) for stage in range(stages)]
    return with_transfers(ordered, chunks)


def with_transfers(ordered: Sequence[Iterable[Pass]], chunks: int = 1) -> list[list[Instruction]]:
    """Return the passes of each stage with the transfers between them.

    Transfers have one order over all stages, so that none waits for another in a circle even where
    each blocks its stage.

    Args:
        chunks: of each stage.
    """
    stages = len(ordered)
    parts = range(stages * chunks)
    left = [deque(mine) for mine in ordered]
    instructions: list[list[Instruction]] = [[] for _ in range(stages)]
    done: set[Pass] = set()
    while any(left):
        ready = [
            queue.popleft()
            for queue in left
            if queue and (queue[0].before in done or queue[0].before.part not in parts)
        ]
        assert ready, "the passes of all stages wait for each other"
        for made in ready:
            instructions[made.part % stages].append(made)
        for made in ready:
            if made.next_part in parts:
                source, target = made.part % stages, made.next_part % stages
                instructions[source].append(Send(made, target))
                instructions[target].append(Receive(made, source))
        done.update(ready)
    return instructions


def passes(
    stage: int, stages: int, chunks: int, micro_batches: int, trains: bool
) -> Iterator[Pass]:
    """Yield a stage's passes: forward ones ahead, then one of each kind in turn, then backward
    ones.

    Each part sees its micro-batches in order, so gradients add up as in any other layout.
    """
    order = list(turns(stages, chunks, micro_batches))
    forward = (Pass(True, chunk * stages + stage, index) for chunk, index in order)
    if not trains:
        yield from forward
        return
    last = chunks - 1
    backward = (Pass(False, (last - chunk) * stages + stage, index) for chunk, index in order)
    ahead = min(len(order), 2 * (stages - stage - 1) + (chunks - 1) * stages)
    for _ in range(ahead):
        yield next(forward)
    yield from chain.from_iterable(zip(forward, backward, strict=False))
    yield from backward


def most_held(stage: int, stages: int, micro_batches: int, sizes: Sequence[float]) -> float:
    """The most that a stage holds at a time for backward passes.

    Args:
        sizes: what a forward pass through each of its chunks leaves behind.
    """
    held = most = 0.0
    for step in passes(stage, stages, len(sizes), micro_batches, trains=True):
        size = sizes[step.part // stages]
        held += size if step.is_forward else -size
        most = max(most, held)
    return most


def turns(stages: int, chunks: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch): as many micro-batches as there are stages through one chunk, then the
    same through the next.
    """
    for start in range(0, micro_batches, stages):
        for chunk in range(chunks):
            for index in range(start, min(start + stages, micro_batches)):
                yield chunk, index


def sliced_schedule(stages: int, slices: int, micro_batches: int) -> list[list[Instruction]]:
    """Return the instructions of each stage, in order, forward and backward."""
    return with_transfers(
        [sliced_passes(stage, stages, slices, micro_batches) for stage in range(stages)]
    )


def sliced_passes(stage: int, stages: int, slices: int, micro_batches: int) -> Iterator[Pass]:
    """Yield a stage's passes: forward ones ahead, then one of each kind in turn, then backward
    ones.
    """
    order = list(product(range(micro_batches), range(slices)))
    forward = (Pass(True, stage, *place) for place in order)
    backward = (Pass(False, stage, index, slices - 1 - number) for index, number in order)
    for _ in range(ahead(stage, stages, slices, micro_batches)):
        yield next(forward)
    yield from chain.from_iterable(zip(forward, backward, strict=False))
    yield from backward


def ahead(stage: int, stages: int, slices: int, micro_batches: int) -> int:
    """Return how many forward passes a stage makes before each backward pass comes with one."""
    return min(micro_batches * slices, stages - stage - 1 + slices - 1)


def most_slices(stage: int, stages: int, slices: int, micro_batches: int) -> int:
    """Return the most slices that a stage holds at a time for backward passes."""
    return min(micro_batches * slices, ahead(stage, stages, slices, micro_batches) + 1)
