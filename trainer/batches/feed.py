"""Gives every rank its inputs of a step: the leader reads, the others get their part from it."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.schemas.train.parallel_dims import Coordinates
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.extras import Extras
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.messages import gather, receive, send
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_packer import OverlongCount
from headrace.trainer.parallel import RankLayout
from headrace.trainer.shards.packed_rows import PackedRow


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one rank for one step. Shapes as in `Batch`."""

    micro_batches: int
    document_lengths: list[list[list[int]]]
    row_lengths: list[list[int]]
    trained_tokens: int  # of the whole global batch, over all replicas
    tokens: int  # likewise
    position: Position  # of the loader, after this step
    overlong: OverlongCount  # of the whole global batch
    pair_count: int = 0  # of the whole global batch
    chosen_tokens: int = 0  # likewise: trained tokens of chosen answers
    extras: list[Extras] = field(default_factory=list)  # of each micro-batch
    input_ids: Tensor | None = None  # first stage only
    labels: Tensor | None = None  # last stage only
    rows: list[list[list[PackedRow]]] | None = None  # at one rank of the first and last stage each

    @property
    def leader_rows(self) -> list[list[list[PackedRow]]] | None:
        """The rows, at the leader only."""
        return None if self.input_ids is None else self.rows


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


def with_pinned(inputs: StepInputs) -> StepInputs:
    """Return inputs with their tokens in memory that a GPU can read from."""
    return replace(inputs, input_ids=pinned(inputs.input_ids), labels=pinned(inputs.labels))


def pinned(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor to memory that a GPU can read from while the process goes on."""
    if tensor is None or not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory()


def _inputs_of(batch: Batch, place: Coordinates, stages: int, total: Counts) -> StepInputs:
    first, last = place.stage == 0, place.stage == stages - 1
    tells = (first or last) and place.sequence == 0
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
        extras=[extras.of_stage(last=last) for extras in batch.extras],
    )
