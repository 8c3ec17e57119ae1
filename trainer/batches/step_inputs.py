"""Inputs of one rank for one step."""

from dataclasses import dataclass, field

from torch import Tensor

from headrace.trainer.batches.extras import Extras
from headrace.trainer.order.position import OverlongCount, Position
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
