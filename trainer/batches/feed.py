"""Gives every rank its inputs of a step: the leader reads, the others get their part from it."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.schemas.train.parallel_dims import Coordinates
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer import devices
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.messages import gather, receive, send
from headrace.trainer.parallel import RankLayout


class Feed:
    """An endless supply of `StepInputs`; only the leader of a replica has a loader.

    One message goes from the leader to each other rank of its replica per step: document
    boundaries to all, token ids to the first stage, labels to the last, and rows' names to one rank
    of that. Where ranks share rows, each is given them whole and takes its slice to the device.
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
        """This replica's share of the next global batch, at the leader; nothing elsewhere."""
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
        """Give every rank of the replica its part of what the leader has read."""
        if batch is None:
            received: StepInputs = receive(self.layout.leader, self.layout.replica_group)
            return with_pinned(received)
        counts = gather(Counts.of(batch), self.layout.first_stage_group)
        total = Counts(*map(sum, zip(*counts, strict=True)))
        for place in self.layout.dims.places(self.layout.replica)[1:]:
            inputs = _inputs_of(batch, place, self.layout.stages, total)
            send(inputs, self.layout.dims.rank(place), self.layout.replica_group)
        return with_pinned(_inputs_of(batch, self.layout.coordinates, self.layout.stages, total))


class Counts(NamedTuple):
    """Denominators of the losses, with the names of `StepInputs`."""

    trained_tokens: int
    tokens: int
    pair_count: int
    chosen_tokens: int

    @classmethod
    def of(cls, batch: Batch) -> "Counts":
        """One replica's share."""
        pairs = sum(len(place) for extras in batch.extras for place in extras.pairs or ())
        return cls(batch.trained_tokens, batch.tokens, pairs, batch.chosen_tokens)


def with_pinned(inputs: StepInputs) -> StepInputs:
    """Return inputs with their tokens in memory that a GPU can read from."""
    return replace(inputs, input_ids=pinned(inputs.input_ids), labels=pinned(inputs.labels))


def pinned(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor to memory that a GPU can read from while the process goes on."""
    return None if tensor is None else devices.pin(tensor)


def _inputs_of(batch: Batch, place: Coordinates, stages: int, total: Counts) -> StepInputs:
    first, last = place.stage == 0, place.stage == stages - 1
    tells = (first or last) and place.sequence == place.tensor == 0
    return StepInputs(
        micro_batches=len(batch.document_lengths),
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        **total._asdict(),
        position=batch.position,
        overlong=batch.overlong,
        input_ids=batch.input_ids if first else None,
        labels=batch.labels if last else None,
        rows=batch.rows if tells else None,
        extras=[extras.of_stage(first=first, last=last) for extras in batch.extras],
    )
