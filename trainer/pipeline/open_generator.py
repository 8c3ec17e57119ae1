"""A stage's generator for a run: its links, and the tokens that end an answer."""

from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.stop_tokens import stop_tokens
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.generation import Generator
from headrace.trainer.pipeline.links import PipelineLinks


def open_generator(
    config: ModelConfig,
    settings: RejectedSamplingConfig,
    inputs: Inputs,
    layout: RankLayout,
    built: BuiltStage,
) -> Generator:
    """Return this rank's part in generating.

    Raises:
        ConfigError: nothing ends an answer.
    """
    return Generator(
        built.stage,
        PipelineLinks(layout),
        layout.device,
        built.architecture.stream.width,
        settings,
        stop_tokens(settings, model_directory(config.model, config.weights), inputs.train),
    )
