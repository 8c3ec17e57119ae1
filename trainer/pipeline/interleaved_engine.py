"""The engine for stages that hold several chunks of layers each: the same step with less waiting.

Of DeepSpeed it uses the process grid; schedule and transfers are ours. What is computed, and in
which order gradients add up, is the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.schemas.train.data_config import BatchConfig
from headrace.trainer.building.interleaved_schedule import (
    Instruction,
    Pass,
    Receive,
    Send,
    schedule,
)
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.engine import ForwardOutput, StageEngine
from headrace.trainer.pipeline.transfers import Transfers
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice
from headrace.trainer.stage.stage import Stage


class InterleavedEngine(StageEngine):
    """Runs interleaved 1F1B.

    Args:
        chunks: in the order of the model.
        width: of the hidden states.
    """

    def __init__(
        self,
        chunks: Sequence[Stage],
        config: BatchConfig,
        layout: RankLayout,
        width: int,
        transfers: Transfers,
        *,
        timed: bool = False,
    ) -> None:
        super().__init__(chunks, config, layout, timed=timed)
        self.width = width
        self.transfers = transfers
        self._kept: dict[Pass, tuple[Tensor, ForwardOutput]] = {}  # by backward pass
        self._results: dict[Pass, Tensor] = {}  # until they are sent

    def _execute(self, micro_batches: int, *, trains: bool) -> None:
        for instruction in self._plan(micro_batches, trains=trains)[self.layout.stage]:
            match instruction:
                case Send(made_by, stage):
                    self.transfers.send(made_by, self._results.pop(made_by), stage)
                case Receive(made_by, stage):
                    self.transfers.receive(made_by, self._empty(made_by), stage)
                case Pass(is_forward=True):
                    self._forward_part(instruction, trains=trains)
                case Pass(is_forward=False):
                    self._backward_part(instruction)
        self.transfers.finish()
        assert not self._kept and not self._results

    def _plan(self, micro_batches: int, *, trains: bool) -> list[list[Instruction]]:
        """Return the instructions of all stages."""
        return schedule(self.layout.stages, len(self.chunks), micro_batches, trains=trains)

    def _rows(self, todo: Pass) -> RowSlice:
        """Return the tokens of rows that a pass is about."""
        return WHOLE_ROWS

    def _forward_part(self, todo: Pass, *, trains: bool) -> None:
        chunk, rows = self._chunk(todo.part), self._rows(todo)
        if chunk.embedding is not None:
            hidden = self._token_ids(todo.micro_batch, rows)
        else:
            with self.timeline.span("RecvActivation"):
                hidden = self.transfers.take(todo.before)
            hidden.requires_grad_(trains)
        with self.timeline.span("ForwardPass"):
            output = self._forward(chunk, hidden, todo.micro_batch, rows)
        if trains:
            self._kept[todo.reverse] = hidden, output
        if chunk.loss is None:
            self._results[todo] = output.value.detach()

    def _backward_part(self, todo: Pass) -> None:
        hidden, output = self._kept.pop(todo)
        chunk, gradient = self._chunk(todo.part), None
        if chunk.loss is None:
            with self.timeline.span("RecvGrad"):
                gradient = self.transfers.take(todo.before)
        with self.timeline.span("BackwardPass"):
            self._go_back(todo, output, gradient)
        if chunk.embedding is None:
            assert hidden.grad is not None
            self._results[todo] = hidden.grad

    def _go_back(self, todo: Pass, output: ForwardOutput, gradient: Tensor | None) -> None:
        output.backward(gradient)

    def _chunk(self, part: int) -> Stage:
        return self.chunks[part // self.layout.stages]

    def _empty(self, made_by: Pass) -> Tensor:
        """Room for the hidden states of a micro-batch, or their gradient."""
        assert self._inputs is not None
        lengths, chunk = self._inputs.document_lengths[made_by.micro_batch], self.chunks[0]
        rows = len(lengths) * (1 if chunk.reference is None else 2)
        start, end = self._rows(made_by).bounds(sum(lengths[0]))
        shape = (rows, (end - start) // self.sequence.ranks, self.width)
        return torch.empty(shape, dtype=chunk.hidden_dtype, device=self.device)
