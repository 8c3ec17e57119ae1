"""Sources to a finished shard directory: plan, run tasks, write shards, manifest last."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

from headrace.dataprep.input.files import find_inputs, inputs_fingerprint
from headrace.dataprep.input.pieces import InputFile, Task
from headrace.dataprep.passes.dedup_pass import find_duplicates
from headrace.dataprep.passes.limit_rank import RowCuts
from headrace.dataprep.passes.merge_runs import write_shards
from headrace.dataprep.passes.mixing import mix
from headrace.dataprep.passes.recorded_inputs import changed_input, record_inputs
from headrace.dataprep.passes.rejects import check_rejects, check_sources, collect_rejects
from headrace.dataprep.passes.row_limits import limit_rows
from headrace.dataprep.passes.shard_writer import Target
from headrace.dataprep.passes.sorted_runs import Runs
from headrace.dataprep.passes.task_runner import finished_task, run_task
from headrace.dataprep.planning import build_context, plan
from headrace.dataprep.rows.task_stats import (
    StatsSum,
    TaskStats,
    add_counts,
    add_stats,
    source_record,
)
from headrace.dataprep.shards.blend_inputs import read_settings
from headrace.dataprep.shards.html_report import write_report
from headrace.dataprep.text.chat_losses import losses
from headrace.dataprep.text.tokenizer import TOKENIZER_NAME, open_tokenizer, read_content
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.local_engine import Engine, LocalEngine
from headrace.dataprep.work.reporter import LoggedReporter, Reporter
from headrace.dataprep.work.task_progress import TaskBar
from headrace.dataprep.work.workspace import (
    CONFIG_NAME,
    locked,
    open_output,
    remove_work,
)
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.publish import write_atomic
from headrace.schemas.shards.manifest import (
    ImagesRecord,
    Manifest,
    PictureLedger,
    ShardRecord,
    TokenizerRecord,
    TokenLedger,
)
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.shard_format import EVALUATION, MANIFEST_NAME, SPLITS, TRAIN
from headrace.schemas.shards.tokenizer_content import content_fingerprint
from headrace.schemas.vision.processor_record import Processor

TOKENS_IN_EVALUATION_FILE = 1 << 26
SHOWN_KEYS = 8
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig,
    workers: int | None = None,
    reporter: Reporter | None = None,
    engine: Engine | None = None,
    budgets: Budgets | None = None,
) -> Manifest:
    """Write the shard directory that the config describes; the same config gives the same bytes.

    An unfinished directory is continued, a finished one reused.

    Args:
        workers: processes of this machine. Default: one for each core.
        reporter: who is told of progress and of the end. Default: the log.
        engine: who runs the work, instead of processes of this machine.
        budgets: what is held at once; changes no byte.

    Raises:
        DataError: inputs, tokenizer or output are missing, damaged or do not match; too many
            documents are refused.
        KeyboardInterrupt: stopped by Ctrl-C, after one line; the same call continues.
    """
    reporter = reporter or LoggedReporter()
    context = build_context(config, budgets)
    inputs = find_inputs(context.config.sources)
    inputs_key = inputs_fingerprint(context.config.sources, inputs)
    finished = finished_manifest(context, inputs_key, inputs)
    if finished is not None:
        remove_work(context.output)
        reporter.line(f"{config.output}: finished before with this config and these inputs; reused")
        return told(reporter, finished)
    tasks = plan(context, inputs)
    open_output(context.output)
    with locked(context.output), closing(LocalEngine(workers)) as local:
        context.space.open()
        try:
            manifest = run(context, tasks, inputs, engine or local, reporter)
        except KeyboardInterrupt:
            reporter.line(f"{config.output}: stopped; run the same command to continue")
            raise
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise DataError(
                f"{config.output}: cannot be written ({os.strerror(error.errno)}); make room, "
                "then run the same command to go on"
            ) from None
        remove_work(context.output)
    return told(reporter, manifest)


def told(reporter: Reporter, manifest: Manifest) -> Manifest:
    """Return the manifest once its tables are shown and what templates left out is logged."""
    reporter.finished(manifest)
    for line in losses(manifest):
        logger.warning("%s", line)
    return manifest


def finished_manifest(
    context: Context, inputs_key: str, inputs: list[list[InputFile]]
) -> Manifest | None:
    """The manifest of an output that is finished already, or None.

    Raises:
        DataError: it was prepared with another config or from other inputs.
    """
    if not (context.output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(context.output)
    remedy = "set another output, or remove the directory"
    if manifest.config_fingerprint != context.fingerprint():
        raise DataError(
            f"{context.output}: finished with another config{difference(context)}; {remedy}"
        )
    if manifest.inputs_fingerprint != inputs_key:
        raise DataError(f"{context.output}: finished from other inputs; {remedy}")
    if file := changed_input(context.output, inputs):
        raise DataError(f"{context.output}: finished before {file} was changed; {remedy}")
    return manifest


def difference(context: Context) -> str:
    """Return the keys in which a finished directory's config is another, for a message."""
    known, own = read_settings(context.output), context.settings()
    names = sorted(differing(known, own, ""))[:SHOWN_KEYS]
    return f" (other: {', '.join(names)})" if names else ""


def differing(left: object, right: object, name: str) -> Iterator[str]:
    """Return the dotted names of values that differ."""
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if not isinstance(left, dict) or not isinstance(right, dict):
        if left != right:
            yield name.removeprefix(".config.").removeprefix(".")
        return
    for key in left.keys() | right.keys():
        yield from differing(left.get(key), right.get(key), f"{name}.{key}")


def run(
    context: Context,
    tasks: list[Task],
    inputs: list[list[InputFile]],
    engine: Engine,
    reporter: Reporter,
) -> Manifest:
    """Everything from planned tasks to the published manifest."""
    save_settings(context)
    # workers on other machines may see only the output
    copy = str(context.output / TOKENIZER_NAME)
    context = replace(context, tokenizer=replace(context.tokenizer, file=copy))
    described = context
    if context.config.deduplicate.enabled or context.config.mix_sources:
        context = find_duplicates(context, tasks, engine, reporter)
    if context.config.mix_sources:
        context, tasks = mix(context, tasks)
    by_source = run_tasks(context, tasks, engine, reporter)
    collect_rejects(context, len(tasks))
    check_rejects(context, by_source)
    check_sources(context, by_source)
    cuts, by_source = limit_rows(context, tasks, by_source, engine)
    splits = plan_splits(context, tasks, add_stats(by_source.values()), cuts)
    shards = write_shards(shard_target(context), splits, engine, reporter)
    record_inputs(context.output, inputs)
    inputs_key = inputs_fingerprint(described.config.sources, inputs)
    manifest = build_manifest(described, inputs_key, by_source, shards)
    write_report(context.output, manifest, by_source, open_tokenizer(described.tokenizer, True))
    write_manifest(context.output, manifest)
    return manifest


def save_settings(context: Context) -> None:
    """Put the resolved config and a copy of the tokenizer beside the shards."""
    settings = json.dumps(context.settings(), indent=1, ensure_ascii=False) + "\n"
    write_atomic(context.output / CONFIG_NAME, settings)
    write_atomic(context.output / TOKENIZER_NAME, read_content(context.tokenizer))


def run_tasks(
    context: Context, tasks: list[Task], engine: Engine, reporter: Reporter
) -> dict[str, TaskStats]:
    """The counts of each source, in config order; tasks that are finished are not run again."""
    sums = {source.name: StatsSum() for source in context.config.sources}
    todo: list[Task] = []
    for task in tasks:
        if (stats := finished_task(context, task)) is None:
            todo.append(task)
        else:
            sums[task.source.name].add(stats)
    if len(todo) < len(tasks):
        done = len(tasks) - len(todo)
        logger.info("%s: %d of %d tasks are done already", context.output, done, len(tasks))
    title = "pack    " if context.corpus else "tokenize"
    with TaskBar(reporter, title, context.space, todo) as bar:
        for task, stats in engine.run(partial(run_task, context), todo):
            sums[task.source.name].add(stats)
            bar.finish(task, stats.documents, stats.tokens_in)
    return {name: total.total() for name, total in sums.items()}


def plan_splits(
    context: Context, tasks: list[Task], total: TaskStats, cuts: RowCuts
) -> list[tuple[Runs, int]]:
    """Return the rows of each split and its number of shards, in evaluation by its size."""
    if not total.rows.get(TRAIN):
        if cuts.tops:
            raise DataError("max_rows and max_tokens leave no train row; raise them")
        raise DataError(
            f"the evaluation split took every document ({total.kept}); lower evaluation_fraction"
        )
    evaluation_tokens = total.weight(EVALUATION)
    counts = {
        TRAIN: context.config.shards,
        EVALUATION: -(-evaluation_tokens // TOKENS_IN_EVALUATION_FILE),
    }
    rows_key = fingerprint([*map(context.task_key, tasks), *([asdict(cuts)] if cuts.tops else [])])
    return [
        (Runs(split, len(tasks), total.weight(split), rows_key, cuts=cuts), counts[split])
        for split in SPLITS
    ]


def shard_target(context: Context) -> Target:
    """Return the target that shards are written to."""
    rows_in_group = max(1, context.config.row_group_tokens // context.config.sequence_len)
    images = context.config.images
    group_bytes = None if images is None else images.row_group_bytes
    return Target(context.space, context.config.kind, rows_in_group, group_bytes)


def build_manifest(
    context: Context, inputs_key: str, by_source: dict[str, TaskStats], shards: list[ShardRecord]
) -> Manifest:
    """The manifest; tokens in were counted at the tokenizer, tokens out in the written files."""
    tokens_out = dict.fromkeys(SPLITS, 0)
    for shard in shards:
        tokens_out[shard.split] += shard.tokens
    ledger = TokenLedger(
        tokens_in=sum(stats.tokens_in for stats in by_source.values()),
        tokens_out=tokens_out,
        tokens_dropped=add_counts(stats.tokens_dropped for stats in by_source.values()),
    )
    assert ledger.difference() == 0, f"token ledger is off by {ledger.difference()}"
    return Manifest(
        kind=context.config.kind,
        tokenizer=TokenizerRecord(
            fingerprint=context.tokenizer.sha256,
            content_fingerprint=content_fingerprint(
                read_content(context.tokenizer), context.tokenizer.file
            ),
            vocabulary_size=context.tokenizer.vocabulary_size,
            special_tokens=dict(context.tokenizer.special_tokens),
        ),
        sequence_len=context.config.sequence_len,
        packing=context.config.packing,
        seed=context.config.seed,
        config_fingerprint=context.fingerprint(),
        inputs_fingerprint=inputs_key,
        shards=shards,
        sources=[source_record(name, stats) for name, stats in by_source.items()],
        ledger=ledger,
        images=images_record(context, by_source),
    )


def images_record(context: Context, by_source: dict[str, TaskStats]) -> ImagesRecord | None:
    """Return what the manifest tells of pictures: in as they were read, out as rows have them."""
    if context.config.images is None:
        return None
    identity = context.config.images.identity
    assert identity is not None, "the config is resolved"
    total = add_stats(by_source.values())
    ledger = PictureLedger(
        pictures_in=total.pictures_in,
        pictures_out={split: total.pictures.get(split, 0) for split in SPLITS},
        pictures_dropped=total.pictures_dropped,
    )
    assert ledger.difference() == 0, f"picture ledger is off by {ledger.difference()}"
    processor = Processor(identity["family"], identity["settings"])
    return ImagesRecord(
        family=processor.family,
        settings=processor.settings,
        placeholder_id=identity["placeholder_id"],
        fingerprint=processor.fingerprint,
        ledger=ledger,
    )
