"""The evaluation sets of a run, and the loaders of their rows."""

from functools import partial

from headrace.schemas.shards.shard_format import EVALUATION
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_loader
from headrace.trainer.messages import from_first_rank
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.position import Position
from headrace.trainer.order.sequences import count_sequences, evaluation_stream
from headrace.trainer.parallel import RankLayout
from headrace.trainer.run.evaluation import EvaluationSet
from headrace.trainer.shards.shard_reader import ShardReader

EVALUATION_MICRO_BATCHES = 32  # per replica and call: the pipeline drains only in between


def build_evaluation_sets(
    config: TrainConfig, inputs: Inputs, layout: RankLayout
) -> list[EvaluationSet]:
    """One set per `[[evaluation_datasets]]` table: its first rows in file order, each once."""
    sets = []
    for dataset, name, manifest in zip(
        config.evaluation_datasets, config.evaluation_names(), inputs.evaluation, strict=True
    ):
        rows = sum(shard.rows for shard in manifest.split(EVALUATION))
        rows = min(rows, dataset.max_rows or rows)
        stream = evaluation_stream(config, dataset.path, manifest)
        reader = ShardReader(stream.facts, stream)
        count = partial(count_sequences, inputs.sequence_tokens, stream, reader, rows, Position())
        places = from_first_rank(count, layout)
        loader = None
        if layout.leads:
            loader = build_loader(config, inputs, layout, stream, EVALUATION_MICRO_BATCHES, rows)
        per_batch = config.micro_batch_size * EVALUATION_MICRO_BATCHES * layout.replicas
        sets.append(EvaluationSet(name, -(-places // per_batch), Feed(layout, loader), loader))
    return sets
