"""The engine for rows that go through the stages in slices: the same step with less waiting.

It evaluates with whole rows, whose passes leave nothing behind.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headrace.kernels.token_statistics import TokenStatistics
from headrace.schemas.train.model_config import LayoutConfig
from headrace.trainer.building.interleaved_schedule import Instruction, Pass, sliced_schedule
from headrace.trainer.layers.router_loss import balance_loss, total_loss
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.engine import ForwardOutput, go_back
from headrace.trainer.pipeline.interleaved_engine import InterleavedEngine
from headrace.trainer.pipeline.transfers import Transfers
from headrace.trainer.row_slice import WHOLE_ROWS, KeptKeys, KeptRows, RowSlice
from headrace.trainer.stage.micro_batch import StageOutput
from headrace.trainer.stage.stage import Stage


class SlicedEngine(InterleavedEngine):
    """Runs sliced 1F1B over one chunk of layers a stage."""

    def __init__(
        self,
        chunks: Sequence[Stage],
        config: LayoutConfig,
        layout: RankLayout,
        width: int,
        transfers: Transfers,
        *,
        timed: bool = False,
    ) -> None:
        super().__init__(chunks, config, layout, width, transfers, timed=timed)
        self.slices = config.sequence_slices
        self._in_slices = False
        self._kept_rows: dict[int, KeptRows] = {}  # by micro-batch
        self._router_gradients: dict[int, Sequence[Tensor]] = {}  # likewise, for each layer

    def _execute(self, micro_batches: int, *, trains: bool) -> None:
        self._in_slices = trains
        super()._execute(micro_batches, trains=trains)
        assert not self._kept_rows
        if trains:
            self._outputs = joined(self._outputs, self.slices)

    def _slices(self, *, trains: bool) -> int:
        return self.slices if trains else 1

    def _plan(self, micro_batches: int, *, trains: bool) -> list[list[Instruction]]:
        if trains:
            return sliced_schedule(self.layout.stages, self.slices, micro_batches)
        return super()._plan(micro_batches, trains=False)

    def _rows(self, todo: Pass) -> RowSlice:
        if not self._in_slices:
            return WHOLE_ROWS
        return RowSlice(todo.row_slice, self.slices, self._kept_rows.get(todo.micro_batch))

    def _forward_part(self, todo: Pass, *, trains: bool) -> None:
        if trains and todo.row_slice == 0:
            layers = [KeptKeys() for _ in self.chunks[0].layers]
            self._kept_rows[todo.micro_batch] = KeptRows(layers)
        super()._forward_part(todo, trains=trains)
        if trains:
            _, output = self._kept[todo.reverse]
            kept = self._kept_rows[todo.micro_batch]
            kept.routers.append(list(output.router_parts))
            if todo.row_slice == self.slices - 1:
                self._sum_routers(todo.micro_batch, kept.routers)

    def _sum_routers(self, index: int, slices: list[list[Tensor]]) -> None:
        """Compute the routers' loss of whole rows, and its gradient for what slices add to it."""
        totals = [torch.stack(parts).detach().sum(0) for parts in zip(*slices, strict=True)]
        for total in totals:
            total.requires_grad_()
        losses = [balance_loss(total, self.sequence) for total in totals]
        loss = total_loss(losses, self.chunks[0].router_loss, self._router_scale(index))
        self._router_gradients[index] = ()
        if loss is not None:
            self._router_losses.append(loss.detach() / self._loss_scale)
            self._router_gradients[index] = torch.autograd.grad(loss, totals)

    def _go_back(self, todo: Pass, output: ForwardOutput, gradient: Tensor | None) -> None:
        further = self._router_gradients[todo.micro_batch]
        go_back([output.value, *output.router_parts], [gradient, *further])
        if todo.row_slice == 0:
            del self._kept_rows[todo.micro_batch], self._router_gradients[todo.micro_batch]


def joined(outputs: Sequence[StageOutput], slices: int) -> list[StageOutput]:
    """Return the values of tokens of each micro-batch, from those of its slices."""
    starts = range(0, len(outputs), slices)
    return [join_slices(outputs[start : start + slices]) for start in starts]


def join_slices(outputs: Sequence[StageOutput]) -> StageOutput:
    """Return the values of a micro-batch's tokens."""
    return replace(
        outputs[0],
        value=torch.stack([output.value for output in outputs]).sum(),
        token_losses=side_by_side([output.token_losses for output in outputs]),
        adjusted_losses=side_by_side([output.adjusted_losses for output in outputs]),
        hidden_norms=side_by_side([output.hidden_norms for output in outputs]),
        statistics=join_statistics(outputs),
    )


def join_statistics(outputs: Sequence[StageOutput]) -> TokenStatistics | None:
    """Return those of a micro-batch's tokens, if they were wanted."""
    entropies: list[Tensor] = []
    ranks: list[Tensor] = []
    for output in outputs:
        if output.statistics is None or output.token_losses is None:
            return None
        entropies.append(output.statistics.entropy.view_as(output.token_losses))
        ranks.append(output.statistics.rank.view_as(output.token_losses))
    return TokenStatistics(torch.cat(entropies, dim=1).flatten(), torch.cat(ranks, dim=1).flatten())


def side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join [b, slice] values; None where there are none."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, dim=1) if given else None
