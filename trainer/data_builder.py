"""Builds loaders, orders and evaluation sets from a checked config."""

from pathlib import Path

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.manifest import Manifest
from headrace.schemas.shard_format import EVALUATION, TRAIN
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.distributed import Layout
from headrace.trainer.evaluation import EvaluationSet
from headrace.trainer.feed import Feed
from headrace.trainer.loader import GroupLoader
from headrace.trainer.mixed_order import MixedOrder
from headrace.trainer.preflight import Inputs
from headrace.trainer.row_order import RowOrder
from headrace.trainer.shard_reader import ShardReader, list_row_groups

EVALUATION_MICRO_BATCHES = 32  # per replica and call: the pipeline drains only in between


def build_train_loader(config: TrainConfig, inputs: Inputs, layout: Layout) -> GroupLoader | None:
    """The loader of this pipeline group, on its first stage only."""
    if not layout.is_first:
        return None
    return GroupLoader(
        ShardReader(
            [Path(dataset.path) for dataset in config.datasets],
            inputs.train,
            TRAIN,
            held_row_groups=config.loader.shuffle_window,
            apart=config.mixing == "interleave",
        ),
        build_order(config, inputs),
        sequence_len=inputs.sequence_len,
        micro_batch_size=config.micro_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        replica=layout.replica,
        replicas=layout.replicas,
        stop_row=inputs.stop_row,
        prefetch=config.loader.prefetch_batches,
    )


def build_order(config: TrainConfig, inputs: Inputs) -> RowOrder | MixedOrder:
    """One order over all datasets, or one for each, mixed."""
    window, shuffle = config.loader.shuffle_window, config.loader.shuffle
    groups = list_row_groups(inputs.train, TRAIN)
    plan = inputs.plan
    if plan.schedule is None:
        return RowOrder(groups, config.seed, window, shuffle, plan.dataset_rows)
    orders = [
        RowOrder(
            groups.pick(groups.dataset == dataset),
            derive_seed(config.seed, "dataset", dataset),
            window,
            shuffle,
        )
        for dataset in range(len(inputs.train))
    ]
    return MixedOrder(plan.schedule, orders)


def build_evaluation_sets(
    config: TrainConfig, inputs: Inputs, layout: Layout
) -> list[EvaluationSet]:
    """One set per `[[evaluation_datasets]]` table."""
    sets = []
    for dataset, name, manifest in zip(
        config.evaluation_datasets, config.evaluation_names(), inputs.evaluation, strict=True
    ):
        rows = sum(shard.rows for shard in manifest.split(EVALUATION))
        rows = min(rows, dataset.max_rows or rows)
        loader = build_evaluation_loader(config, Path(dataset.path), manifest, inputs, layout, rows)
        per_batch = config.micro_batch_size * EVALUATION_MICRO_BATCHES * layout.replicas
        sets.append(EvaluationSet(name, -(-rows // per_batch), Feed(layout, loader), loader))
    return sets


def build_evaluation_loader(
    config: TrainConfig, path: Path, manifest: Manifest, inputs: Inputs, layout: Layout, rows: int
) -> GroupLoader | None:
    """File order, each row once."""
    if not layout.is_first:
        return None
    return GroupLoader(
        ShardReader([path], [manifest], EVALUATION, held_row_groups=1),
        RowOrder(list_row_groups([manifest], EVALUATION), config.seed, window=1, shuffle=False),
        sequence_len=inputs.sequence_len,
        micro_batch_size=config.micro_batch_size,
        micro_batches=EVALUATION_MICRO_BATCHES,
        replica=layout.replica,
        replicas=layout.replicas,
        stop_row=rows,
        prefetch=config.loader.prefetch_batches,
    )
