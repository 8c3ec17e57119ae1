"""Messages between the stages of a pipeline while they generate."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.trainer.parallel import RankLayout


class Links(Protocol):
    """One stage's lines to the others. All go through the same batches in the same order."""

    stage: int
    stages: int

    def send_states(self, states: Tensor) -> None:
        """Send states to the next stage; return before it has them."""

    def receive_states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receive states from the stage before."""

    def publish_tokens(self, tokens: Tensor) -> None:
        """Send tokens from the last stage to all others; return before they have them.

        [b] int64, on CPU.
        """

    def await_tokens(self, count: int) -> Tensor:
        """Return, at the other stages, the next tokens that the last stage sent."""

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""


class PipelineLinks:
    """Hidden states go from process to process, tokens over the CPU group of the pipeline.

    So each pair of devices talks in one direction only, and no order of calls can block both.
    """

    def __init__(self, layout: RankLayout) -> None:
        self.layout = layout
        self.stage, self.stages = layout.stage, layout.stages
        self._sent: list[tuple[Any, Tensor]] = []  # kept until it has arrived
        self._published: list[tuple[Any, Tensor]] = []

    def send_states(self, states: Tensor) -> None:
        self._wait(self._sent)
        states = states.contiguous()
        work = dist.isend(states, dst=self.layout.rank_of(self.stage + 1))
        self._sent.append((work, states))

    def receive_states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        states = torch.empty(shape, dtype=dtype, device=self.layout.device)
        dist.recv(states, src=self.layout.rank_of(self.stage - 1))
        return states

    def publish_tokens(self, tokens: Tensor) -> None:
        if self.stages == 1:
            return
        group = self.layout.pipeline_group
        work = dist.broadcast(tokens, src=self.layout.rank, group=group, async_op=True)
        self._published.append((work, tokens))

    def await_tokens(self, count: int) -> Tensor:
        tokens = torch.empty(count, dtype=torch.int64)
        source = self.layout.rank_of(self.stages - 1)
        dist.broadcast(tokens, src=source, group=self.layout.pipeline_group)
        return tokens

    def finish(self) -> None:
        self._wait(self._sent)
        self._wait(self._published)

    def _wait(self, pending: list[tuple[Any, Tensor]]) -> None:
        for work, _ in pending:
            work.wait()
        pending.clear()
