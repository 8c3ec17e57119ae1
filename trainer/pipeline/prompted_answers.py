"""Answers to chosen prompts during evaluations, by the model as it is and through its stages."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.shards.tokenizer_content import with_tokens
from headrace.schemas.train.data_config import DataConfig
from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.schemas.train.run_config import EvaluationConfig
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.messages import broadcast
from headrace.trainer.metrics.answers_log import PromptedAnswer
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.sequences import evaluation_stream
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.answers import Prompt
from headrace.trainer.pipeline.generation import Generator
from headrace.trainer.pipeline.open_generator import open_generator
from headrace.trainer.shards.decoded_rows import DecodedRows, Row
from headrace.trainer.shards.shard_reader import ShardReader
from headrace.trainer.stage.cached_stage import check_generates

ASKED = "[evaluation] prompts"


class Asked(NamedTuple):
    """Token ids of a prompt, and of the answer that its row has, if it comes from one."""

    ids: list[int]
    expected: list[int] | None = None


class PromptedAnswers:
    """One stage's part in answering; the first replica does it, and the others wait."""

    def __init__(
        self,
        generator: Generator,
        layout: RankLayout,
        tokenizer: Tokenizer,
        asked: Sequence[Asked],
        prompts: Sequence[Prompt],
    ) -> None:
        self.generator = generator
        self.layout = layout
        self.tokenizer = tokenizer
        self.asked = asked
        self.prompts = prompts

    def answer(self) -> list[PromptedAnswer]:
        """Return the answers, at the first rank; none elsewhere. Every rank takes part."""
        if self.layout.replica or not self.prompts:
            return []
        answers = self.generator.generate(self.prompts)
        if self.layout.rank:
            return []
        return [
            PromptedAnswer(
                self.tokenizer.decode(asked.ids, skip_special_tokens=False),
                self.tokenizer.decode(answer.ids, skip_special_tokens=True),
                len(answer.ids),
                answer.ended,
                None
                if asked.expected is None
                else self.tokenizer.decode(asked.expected, skip_special_tokens=True),
            )
            for asked, answer in zip(self.asked, answers, strict=True)
        ]


def open_prompted_answers(
    config: ModelConfig,
    evaluation: EvaluationConfig,
    rows: Sequence[Asked],
    inputs: Inputs,
    layout: RankLayout,
    built: BuiltStage,
) -> PromptedAnswers | None:
    """Return what answers the prompts of the config, if it has any; every rank takes part.

    Args:
        rows: prompts of rows, where this rank leads its replica.

    Raises:
        ConfigError: the model cannot generate in the pipeline, has no tokenizer, or no stop token.
    """
    architecture = built.architecture
    if not evaluation.asks:
        return None
    tokenizer = tokenizer_of(config)
    asked = None
    if layout.leads:
        texts = [Asked(tokenizer.encode(text).ids) for text in evaluation.prompts]
        asked = [*texts, *rows]
    asked = broadcast(asked, layout.leader, layout.pipeline_group)
    limit = evaluation.max_new_tokens
    settings = RejectedSamplingConfig(temperature=evaluation.temperature)
    prompts = [
        Prompt(item.ids, limit, derive_seed(config.seed, "prompted answers", number))
        for number, item in enumerate(asked)
    ]
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + limit
    check_generates(built.stage, architecture, longest, ASKED)
    generator = open_generator(config, settings, inputs, layout, built)
    return PromptedAnswers(generator, layout, tokenizer, asked, prompts)


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of the model, with the tokens that the config adds.

    Raises:
        ConfigError: there is none.
    """
    path = model_directory(config.model, config.weights) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{ASKED}: {path} is not there, and texts need it; drop them")
    content, _ = with_tokens(path.read_bytes(), config.model_overrides.new_tokens)
    return Tokenizer.from_str(content.decode())


def asked_by_rows(config: DataConfig, inputs: Inputs, count: int) -> Iterator[Asked]:
    """Yield the prompts of the first rows of each evaluation set that have some, `count` of each.

    For the rank that leads a replica, which alone opens shards.
    """
    if not count:
        return
    for dataset, manifest in zip(config.evaluation_datasets, inputs.evaluation, strict=True):
        stream = evaluation_stream(config, dataset.path, manifest)
        reader = ShardReader(DecodedRows, stream)
        left = count
        for index in range(sum(shard.rows for shard in manifest.split("evaluation"))):
            found = asked_by_row(reader.row(stream.order[index]))
            if found is not None:
                yield found
                left -= 1
            if not left:
                break


def asked_by_row(row: Row) -> Asked | None:
    """Return the prompt of a row's first document, up to its first trained token, and the rest."""
    end = int(row.document_lengths[0])
    if row.loss_mask is None or not row.loss_mask[:end].any():
        return None
    start = int(np.argmax(row.loss_mask[:end]))
    if not start:
        return None
    return Asked(row.input_ids[:start].tolist(), row.input_ids[start:end].tolist())
