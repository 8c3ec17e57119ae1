"""Hidden states and gradients on their way between stages while the stages go on computing."""

from collections import deque
from typing import Any

import torch.distributed as dist
from torch import Tensor

from headrace.trainer.building.interleaved_schedule import Pass
from headrace.trainer.parallel import RankLayout, transfer_group

# NCCL holds as many multiprocessors while a transfer waits for its other side; 4 of an H100's 132
# move 64 MiB over NVLink in under a millisecond, left alone it takes up to 32.
LARGEST_CTAS = 4
UNDER_WAY = 4  # tensors that are held for sending, at most


class Transfers:
    """Sends and receives that wait for nobody until a result is asked for.

    Both ends of a pair must ask for the transfers between them in one order. Hidden states and
    gradients have groups of their own, so that neither waits for the other.
    """

    def __init__(self, layout: RankLayout, *, ctas: int | None = LARGEST_CTAS) -> None:
        self.layout = layout
        self._groups = {forward: transfer_group(layout, ctas) for forward in (True, False)}
        self._arriving: dict[Pass, tuple[Tensor, Any]] = {}
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def send(self, made_by: Pass, tensor: Tensor, stage: int) -> None:
        """Hand a tensor to a stage of this replica."""
        target = self.layout.rank_of(stage)
        work = dist.isend(tensor, target, group=self._groups[made_by.is_forward])
        self._leaving.append((tensor, work))
        if len(self._leaving) > UNDER_WAY:
            self._leaving.popleft()[1].wait()

    def receive(self, made_by: Pass, empty: Tensor, stage: int) -> None:
        """Let what a pass makes on another stage come into `empty`."""
        source = self.layout.rank_of(stage)
        work = dist.irecv(empty, source, group=self._groups[made_by.is_forward])
        self._arriving[made_by] = empty, work

    def take(self, made_by: Pass) -> Tensor:
        """Return the result of a pass, once it is here; on a GPU only the stream waits."""
        tensor, work = self._arriving.pop(made_by)
        work.wait()
        return tensor

    def finish(self) -> None:
        """Let go of all that was sent."""
        assert not self._arriving, "received, but not used"
        while self._leaving:
            self._leaving.popleft()[1].wait()
