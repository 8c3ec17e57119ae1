"""Gives every rank its inputs of a step: the leader reads, the others get their part from it."""

from dataclasses import replace

from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer import devices
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.batches.step_inputs import Counts, StepInputs
from headrace.trainer.messages import gather, receive, send
from headrace.trainer.parallel import RankLayout


class Feed:
    """An endless supply of `StepInputs`; only the first stage has a loader.

    One message goes from the leader to each other stage of its pipeline group per step: document
    boundaries to all, labels and rows' names to the last.
    """

    def __init__(self, layout: RankLayout, loader: GroupLoader | None) -> None:
        assert (loader is not None) == layout.leads, "one loader per pipeline group"
        self.layout = layout
        self.loader = loader

    def take_quarantined(self) -> list[QuarantineRecord]:
        """Row groups that this rank's loader has given up since the last call."""
        return [] if self.loader is None else self.loader.reader.quarantine.take_new()

    def next(self) -> StepInputs:
        return self.hand_out(self.read())

    def read(self) -> Batch | None:
        """This replica's share of the next global batch, at the first stage; nothing elsewhere."""
        if self.loader is None:
            return None
        batch = next(self.loader, None)
        if batch is None:
            raise DataError(
                "the data ends before the last step: rows that were packed in place of damaged "
                "ones are shorter; continue with --resume, which counts the steps anew"
            )
        return batch

    def hand_out(self, batch: Batch | None) -> StepInputs:
        """Give every stage of the pipeline its part of what the first one has read."""
        if batch is None:
            received: StepInputs = receive(self.layout.leader, self.layout.pipeline_group)
            return replace(received, labels=pinned(received.labels))
        counts = gather(Counts.of(batch), self.layout.first_stage_group)
        total = Counts(*map(sum, zip(*counts, strict=True)))
        for stage in range(1, self.layout.stages):
            inputs = _inputs_of(batch, stage, self.layout.stages, total)
            send(inputs, self.layout.rank_of(stage), self.layout.pipeline_group)
        inputs = _inputs_of(batch, 0, self.layout.stages, total)
        return replace(inputs, input_ids=pinned(inputs.input_ids), labels=pinned(inputs.labels))


def pinned(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor to memory that a GPU can read from while the process goes on."""
    return None if tensor is None else devices.pin(tensor)


def _inputs_of(batch: Batch, stage: int, stages: int, total: Counts) -> StepInputs:
    first, last = stage == 0, stage == stages - 1
    return StepInputs(
        micro_batches=len(batch.document_lengths),
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        **total._asdict(),
        position=batch.position,
        overlong=batch.overlong,
        input_ids=batch.input_ids if first else None,
        labels=batch.labels if last else None,
        rows=batch.rows if first or last else None,
        extras=[extras.of_stage(last=last) for extras in batch.extras],
    )
