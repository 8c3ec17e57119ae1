"""Inputs of a run: its manifests, and the numbers that follow from them."""

from dataclasses import dataclass

from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.order.data_plan import DataPlan

RANDOM = "random"  # in place of a fingerprint, where the weights are made up


@dataclass(frozen=True)
class Inputs:
    """The manifests that a run reads, and what follows from them and the number of processes."""

    train: list[Manifest]
    evaluation: list[Manifest]
    sequence_tokens: int  # tokens of each place in a micro-batch: of a row, or of several if packed
    plan: DataPlan
    rows_per_epoch: int
    dims: ParallelDims
    global_batch_rows: int
    data_fingerprint: str
    weights_fingerprint: str
    model_config_fingerprint: str  # of config.json's content
    sides: int = 1  # places of a row: 2 for a pair

    @property
    def capacity(self) -> int:
        """Tokens of all places of a row, or of rows packed together."""
        return self.sequence_tokens * self.sides
