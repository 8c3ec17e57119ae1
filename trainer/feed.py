"""Gives every rank its inputs of a step: the leader reads, the others get their part from it."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from headrace.trainer.batch import Batch
from headrace.trainer.distributed import Layout, gather_objects
from headrace.trainer.loader import GroupLoader


@dataclass(frozen=True)
class StepInputs:
    """What one rank needs for one step. Shapes as in `Batch`."""

    micro_batches: int
    document_lengths: list[list[list[int]]]
    row_lengths: list[list[int]]
    trained_tokens: int  # of the whole global batch, over all replicas
    tokens: int  # likewise
    input_ids: Tensor | None = None  # first stage only
    labels: Tensor | None = None  # last stage only
    sources: list[list[str]] | None = None  # last stage only
    row_keys: list[list[int | None]] | None = None  # first stage only


class Feed:
    """An endless supply of `StepInputs`; only the first stage has a loader.

    One object goes from the leader to each other stage of its pipeline group per step: document
    boundaries to all, labels and sources to the last.
    """

    def __init__(self, layout: Layout, loader: GroupLoader | None) -> None:
        assert (loader is not None) == layout.is_first, "one loader per pipeline group"
        self.layout = layout
        self.loader = loader

    def next(self) -> StepInputs:
        if self.loader is None:
            received: list[StepInputs] = [None]  # type: ignore[list-item]
            source = self.layout.rank_of(0)
            dist.recv_object_list(received, src=source, group=self.layout.pipeline_group)
            return received[0]
        batch = next(self.loader)
        counts = gather_objects((batch.trained_tokens, batch.tokens), self.layout.leaders_group)
        trained_tokens, tokens = (sum(column) for column in zip(*counts, strict=True))
        for stage in range(1, self.layout.stages):
            inputs = _inputs_of(batch, stage, self.layout.stages, trained_tokens, tokens)
            target = self.layout.rank_of(stage)
            dist.send_object_list([inputs], dst=target, group=self.layout.pipeline_group)
        return _inputs_of(batch, 0, self.layout.stages, trained_tokens, tokens)


def _inputs_of(
    batch: Batch, stage: int, stages: int, trained_tokens: int, tokens: int
) -> StepInputs:
    first, last = stage == 0, stage == stages - 1
    return StepInputs(
        micro_batches=len(batch.document_lengths),
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        trained_tokens=trained_tokens,
        tokens=tokens,
        input_ids=batch.input_ids if first else None,
        labels=batch.labels if last else None,
        sources=batch.sources if last else None,
        row_keys=batch.row_keys if first else None,
    )
