"""The parts of a run, as the loop uses them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from headrace.schemas.train.run_state import RunState
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.feed import Feed
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.checkpoint.checkpoint_folder import (
    CheckpointFolder,
)
from headrace.trainer.metrics.answers_log import PromptedAnswer
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.metrics.metrics import AnswerFacts
from headrace.trainer.order.data_history import (
    DataHistory,
)
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.run.evaluation import EvaluationSet


class RejectedAnswers(Protocol):
    """A source of new rejected answers, for runs whose shards have none."""

    def replace(self, batch: Batch | None, step: int) -> tuple[Batch | None, AnswerFacts]:
        """Return the batch with new answers, and facts of them; None at all but first stages."""


class PromptedAnswers(Protocol):
    """A source of answers to prompts that the config names, for people to read."""

    def answer(self) -> list[PromptedAnswer]:
        """Return the answers, at the first rank; none elsewhere. Every rank takes part."""


@dataclass(frozen=True)
class Session:
    """The parts of a run at one rank, standing at `state`."""

    model: Path
    run_directory: Path
    built: BuiltStage
    engine: StageEngine
    optimizer: torch.optim.Optimizer
    feed: Feed
    rejected_sampling: RejectedAnswers | None
    evaluation_sets: list[EvaluationSet]
    prompted: PromptedAnswers | None
    folder: CheckpointFolder
    log: MetricsLog | None  # first rank only
    data_history: DataHistory
    total_steps: int
    state: RunState
    is_new: bool  # no checkpoint was taken up
