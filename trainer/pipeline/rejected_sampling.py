"""On-policy pairs: before each step the model gives the rejected answers that it is trained on."""

import time
from collections.abc import Sequence

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.batches.batch import Batch
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.messages import broadcast
from headrace.trainer.metrics.metrics import AnswerFacts
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.answers import Answer, Prompt
from headrace.trainer.pipeline.generation import Generator
from headrace.trainer.pipeline.open_generator import open_generator
from headrace.trainer.pipeline.rejected_answers import Room, prompts_of, with_answers
from headrace.trainer.stage.cached_stage import check_generates


class RejectedSampling:
    """One stage's part in it; each replica answers the prompts of its own rows.

    Args:
        seed: root of what is drawn.
    """

    def __init__(
        self,
        generator: Generator,
        layout: RankLayout,
        settings: RejectedSamplingConfig,
        seed: int,
        room: Room,
    ) -> None:
        self.generator = generator
        self.layout = layout
        self.settings = settings
        self.seed = seed
        self.room = room

    def replace(self, batch: Batch | None, step: int) -> tuple[Batch | None, AnswerFacts]:
        """The batch with new rejected answers.

        Args:
            batch: at the first stage; None at the others.
            step: of training, from 0.
        """
        start = time.perf_counter()
        prompts: list[Prompt] | None = None
        if batch is not None:
            seed = derive_seed(self.seed, "rejected answers", step)
            prompts = list(prompts_of(batch, self.room, self.settings, seed))
        prompts = broadcast(prompts, self.layout.leader, self.layout.pipeline_group)
        answers = self.generator.generate(prompts)
        if batch is not None:
            batch = with_answers(batch, answers, self.room)
        return batch, answer_facts(answers, time.perf_counter() - start)


def answer_facts(answers: Sequence[Answer], seconds: float) -> AnswerFacts:
    """Return the facts of one replica's answers, that it took so many seconds to generate."""
    tokens = sum(len(answer.ids) for answer in answers)
    return AnswerFacts(len(answers), tokens, sum(answer.ended for answer in answers), seconds)


def open_rejected_sampling(
    config: ModelConfig, inputs: Inputs, layout: RankLayout, built: BuiltStage
) -> RejectedSampling | None:
    """Return the sampler of rejected answers that the config asks for, if it does.

    Raises:
        ConfigError: the model cannot generate in the pipeline, or nothing ends an answer.
    """
    settings, architecture = config.rejected_sampling, built.architecture
    if settings is None:
        return None
    row_tokens = max(manifest.sequence_len for manifest in inputs.train)
    check_generates(built.stage, architecture, row_tokens)
    generator = open_generator(config, settings, inputs, layout, built)
    room = Room(inputs.sequence_tokens, row_tokens)
    return RejectedSampling(generator, layout, settings, config.seed, room)
