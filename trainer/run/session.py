"""Everything a run is made of, built or resumed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.schemas.train.run_state import RunState
from headrace.trainer.batches.feed import Feed
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.checkpoint.checkpoint_folder import (
    CheckpointFolder,
)
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.order.data_history import (
    DataHistory,
)
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.pipeline.rejected_sampling import RejectedSampling
from headrace.trainer.run.evaluation import EvaluationSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The parts of a run at one rank, standing at `state`."""

    model: Path
    run_directory: Path
    built: BuiltStage
    engine: StageEngine
    optimizer: torch.optim.Optimizer
    feed: Feed
    rejected_sampling: RejectedSampling | None
    evaluation_sets: list[EvaluationSet]
    folder: CheckpointFolder
    log: MetricsLog | None  # first rank only
    data_history: DataHistory
    total_steps: int
    state: RunState
    is_new: bool  # no checkpoint was taken up
