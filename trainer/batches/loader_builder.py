"""Builds loaders from a checked config."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoConfig

from headrace.schemas.train.objectives import Columns
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.batches.answer_batch import make_answer_batch
from headrace.trainer.batches.batch import Batch, make_batch
from headrace.trainer.batches.control_classes import make_controlled_batch
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.batches.pair_batch import make_pair_batch, make_scored_batch
from headrace.trainer.batches.vision_batch import make_vision_batch
from headrace.trainer.order.data_history import DataHistory
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.sequences import (
    RowStream,
    open_sequences,
    train_stream,
)
from headrace.trainer.parallel import RankLayout
from headrace.trainer.shards.decoded_answers import DecodedAnswers
from headrace.trainer.shards.decoded_pairs import DecodedPairs
from headrace.trainer.shards.decoded_rows import Decoded, DecodedRows
from headrace.trainer.shards.shard_reader import ShardReader
from headrace.trainer.vision.processor import Processor, open_processor

TOKEN_BYTES = 8  # of a batch: id and label, both int32
# of a picture's token: 28 x 28 pixels in float32, twice as Qwen-VL's towers take them
PICTURE_BYTES = 28 * 28 * 3 * 4 * 2


def build_train_loader(
    config: TrainConfig,
    inputs: Inputs,
    layout: RankLayout,
    data_history: DataHistory,
    stop_row: int | None,
) -> GroupLoader | None:
    """The loader of this pipeline group, on its first stage only."""
    if not layout.leads:
        return None
    micro_batches = config.gradient_accumulation_steps
    stream = train_stream(config, data_history)
    return build_loader(config, inputs, layout, stream, micro_batches, stop_row)


def build_loader(
    config: TrainConfig,
    inputs: Inputs,
    layout: RankLayout,
    stream: RowStream,
    micro_batches: int,
    stop_row: int | None,
) -> GroupLoader:
    """A loader over a stream, with a reader of its own."""
    reader: ShardReader[Any] = ShardReader(DECODERS[stream.columns], stream)
    return GroupLoader(
        reader,
        partial(open_sequences, inputs.sequence_tokens, stream, reader, stop_row),
        sequence_tokens=inputs.sequence_tokens,
        micro_batch_size=config.micro_batch_size,
        micro_batches=micro_batches,
        replica=layout.replica,
        replicas=layout.replicas,
        prefetch=prefetch_depth(config, micro_batches, inputs.capacity),
        lay_out=batch_maker(config),
    )


DECODERS: dict[Columns, type[Decoded[Any]]] = {
    "rows": DecodedRows,
    "pairs": DecodedPairs,
    "unpaired": DecodedAnswers,
}
LAYOUTS: dict[Columns, Callable[..., Batch]] = {
    "rows": make_batch,
    "pairs": make_pair_batch,
    "unpaired": make_answer_batch,
}


def batch_maker(config: TrainConfig) -> Callable[..., Batch]:
    """Return the function that makes batches of rows, as objective and adapter need them."""
    lay_out = plain_batch_maker(config)
    if config.vision is None:
        return lay_out
    return partial(make_vision_batch, processor=processor_of(config), lay_out=lay_out)


def plain_batch_maker(config: TrainConfig) -> Callable[..., Batch]:
    """Return the function that makes batches of rows without pictures."""
    if config.adapter.record.by_class:
        return partial(make_controlled_batch, seed=config.seed)
    if config.objective.record.scores:
        return partial(make_scored_batch, padding=padding_id(config))
    lay_out = LAYOUTS[config.objective.record.columns]
    return partial(lay_out, mismatched=True) if config.objective.has_baseline else lay_out


def padding_id(config: TrainConfig) -> int | None:
    """Return the id that transformers takes for padding in the model, if any."""
    directory = model_directory(config.model, config.weights)
    model = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    found: int | None = model.get_text_config().pad_token_id
    return found


def processor_of(config: TrainConfig) -> Processor:
    """Return what makes inputs of pictures, by the files of the model."""
    directory = model_directory(config.model, config.weights)
    architecture = read_architecture(directory, vision=True)
    assert architecture.vision is not None
    return open_processor(directory, architecture.vision, architecture.whole)


def prefetch_depth(config: TrainConfig, micro_batches: int, capacity: int) -> int:
    """Batches to read ahead: as many as asked for, and as fit into `prefetch_bytes`, but one."""
    tokens = config.micro_batch_size * micro_batches * capacity
    size = TOKEN_BYTES + (0 if config.vision is None else PICTURE_BYTES)
    fitting = config.loader.prefetch_bytes // (size * tokens)
    return min(config.loader.prefetch_batches, max(1, fitting))
