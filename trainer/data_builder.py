"""Builds loaders and evaluation sets from a checked config."""

from functools import partial

from headrace.schemas.shard_format import EVALUATION
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.course import Course
from headrace.trainer.decoded_rows import DecodedRows
from headrace.trainer.distributed import Layout, from_first_rank
from headrace.trainer.evaluation import EvaluationSet
from headrace.trainer.feed import Feed
from headrace.trainer.loader import GroupLoader
from headrace.trainer.places import (
    RowStream,
    count_places,
    evaluation_stream,
    open_places,
    train_stream,
)
from headrace.trainer.position import Position
from headrace.trainer.preflight import Inputs

EVALUATION_MICRO_BATCHES = 32  # per replica and call: the pipeline drains only in between

TOKEN_BYTES = 16  # of a batch: id and label, both int64


def build_train_loader(
    config: TrainConfig, inputs: Inputs, layout: Layout, course: Course, stop_row: int | None
) -> GroupLoader | None:
    """The loader of this pipeline group, on its first stage only."""
    if not layout.is_first:
        return None
    micro_batches = config.gradient_accumulation_steps
    stream = train_stream(config, course)
    return build_loader(config, inputs, layout, stream, micro_batches, stop_row)


def build_loader(
    config: TrainConfig,
    inputs: Inputs,
    layout: Layout,
    stream: RowStream,
    micro_batches: int,
    stop_row: int | None,
) -> GroupLoader:
    """A loader over a stream, with a reader of its own."""
    reader = stream.reader(DecodedRows)
    return GroupLoader(
        reader,
        partial(open_places, inputs.place_tokens, stream, reader, stop_row),
        place_tokens=inputs.place_tokens,
        micro_batch_size=config.micro_batch_size,
        micro_batches=micro_batches,
        replica=layout.replica,
        replicas=layout.replicas,
        prefetch=prefetch_depth(config, micro_batches, inputs.place_tokens),
    )


def prefetch_depth(config: TrainConfig, micro_batches: int, place_tokens: int) -> int:
    """Batches to read ahead: as many as asked for, and as fit into `prefetch_bytes`, but one."""
    tokens = config.micro_batch_size * micro_batches * place_tokens
    fitting = config.loader.prefetch_bytes // (TOKEN_BYTES * tokens)
    return min(config.loader.prefetch_batches, max(1, fitting))


def build_evaluation_sets(
    config: TrainConfig, inputs: Inputs, layout: Layout
) -> list[EvaluationSet]:
    """One set per `[[evaluation_datasets]]` table: its first rows in file order, each once."""
    sets = []
    for dataset, name, manifest in zip(
        config.evaluation_datasets, config.evaluation_names(), inputs.evaluation, strict=True
    ):
        rows = sum(shard.rows for shard in manifest.split(EVALUATION))
        rows = min(rows, dataset.max_rows or rows)
        stream = evaluation_stream(config, dataset.path, manifest)
        count = partial(count_places, inputs.place_tokens, stream, rows, Position())
        places = from_first_rank(count, layout)
        loader = None
        if layout.is_first:
            loader = build_loader(config, inputs, layout, stream, EVALUATION_MICRO_BATCHES, rows)
        per_batch = config.micro_batch_size * EVALUATION_MICRO_BATCHES * layout.replicas
        sets.append(EvaluationSet(name, -(-places // per_batch), Feed(layout, loader), loader))
    return sets
