"""Finished shard directories to one: another number of shards, another order, a blend."""

import json
import shutil
from functools import partial
from pathlib import Path

from headrace.dataprep.passes.merge_runs import write_shards
from headrace.dataprep.passes.recorded_inputs import INPUTS_NAME
from headrace.dataprep.passes.shard_writer import Target
from headrace.dataprep.passes.sorted_runs import Runs
from headrace.dataprep.shards.blend_inputs import (
    Blend,
    Inputs,
    inputs_fingerprint,
    keeps_order,
    new_settings,
    picture_group_bytes,
    read_inputs,
    row_group_tokens,
    source_names,
)
from headrace.dataprep.shards.blend_manifest import build_manifest
from headrace.dataprep.shards.row_slices import (
    Rekeying,
    RowSlice,
    RowSliceStats,
    finished_row_slice,
    plan_row_slices,
    run_row_slice,
)
from headrace.dataprep.text.tokenizer import TOKENIZER_NAME
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.local_engine import Engine
from headrace.dataprep.work.reporter import LoggedReporter, Reporter
from headrace.dataprep.work.workspace import (
    CONFIG_NAME,
    REJECTS_NAME,
    Workspace,
    locked,
    open_output,
    remove_work,
)
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import NO_ROOM, open_atomic, write_atomic, writing
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.shard_format import EVALUATION, MANIFEST_NAME, SPLITS, TRAIN

TOKENS_IN_EVALUATION_FILE = 1 << 26


def repartition(
    blend: Blend, engine: Engine, reporter: Reporter | None = None, budgets: Budgets | None = None
) -> Manifest:
    """Write the shard directory; the same call over the same directories gives the same bytes.

    Train rows are reshuffled over `shards` files, evaluation rows over as many as their size
    needs. With the seed that a single directory has, rows keep their keys and so their order, and
    the result is what `prepare` writes with that number of shards.

    Raises:
        DataError: a directory is unfinished or damaged, they do not fit together, or the output
            holds something else.
    """
    reporter = reporter or LoggedReporter()
    inputs = read_inputs(blend)
    seed = inputs.first.seed + 1 if blend.seed is None else blend.seed
    settings = new_settings(blend, inputs, seed)
    inputs_key = inputs_fingerprint(inputs, keeps_order(inputs, seed))
    finished = finished_manifest(blend.output, fingerprint(settings), inputs_key)
    if finished is not None:
        remove_work(blend.output)
        reporter.line(f"{blend.output}: finished before from the same directories; reused")
        reporter.finished(finished)
        return finished
    check_outside(blend)
    space = Workspace(blend.output, budgets=budgets or Budgets())
    open_output(blend.output)
    remedy = "make room, then run the same command to go on"
    with locked(blend.output), writing(blend.output, remedy, only=NO_ROOM):
        space.open()
        try:
            manifest = run(space, blend, inputs, seed, settings, inputs_key, engine, reporter)
        except KeyboardInterrupt:
            reporter.line(f"{blend.output}: stopped; run the same command to continue")
            raise
        remove_work(blend.output)
    reporter.finished(manifest)
    return manifest


def run(
    space: Workspace,
    blend: Blend,
    inputs: Inputs,
    seed: int,
    settings: dict[str, object],
    inputs_key: str,
    engine: Engine,
    reporter: Reporter,
) -> Manifest:
    """Everything from the planned portions to the published manifest."""
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomic(blend.output / CONFIG_NAME, text)
    tokenizer = inputs.directories[0] / TOKENIZER_NAME
    write_atomic(blend.output / TOKENIZER_NAME, tokenizer.read_bytes())
    join_files(inputs, blend.output, REJECTS_NAME)
    if any((directory / INPUTS_NAME).is_file() for directory in inputs.directories):
        join_files(inputs, blend.output, INPUTS_NAME)
    rows_in_group = max(1, row_group_tokens(inputs) // inputs.first.sequence_len)
    pictured = inputs.first.images is not None
    group_bytes = picture_group_bytes(inputs) if pictured else None
    target = Target(space, inputs.first.kind, rows_in_group, group_bytes)
    rekeying = Rekeying(source_names(inputs), None if keeps_order(inputs, seed) else seed)
    row_slices = plan_row_slices(
        inputs.directories, inputs.manifests, blend.weights, space.budgets.portion_tokens
    )
    stats = run_portions(target, rekeying, row_slices, engine, reporter)
    splits: list[tuple[Runs, int]] = []
    for split, count in count_shards(blend, stats).items():
        own = [row_slice.work_key(rekeying) for row_slice in row_slices if row_slice.split == split]
        splits.append((Runs(split, len(own), stats.weight(split), fingerprint(own)), count))
    shards = write_shards(target, splits, engine, reporter)
    manifest = build_manifest(inputs, seed, settings, inputs_key, stats, shards)
    write_manifest(blend.output, manifest)
    return manifest


def run_portions(
    target: Target,
    rekeying: Rekeying,
    row_slices: list[RowSlice],
    engine: Engine,
    reporter: Reporter,
) -> RowSliceStats:
    """The counts of all portions together; those that are finished are not read again."""
    total = RowSliceStats()
    todo: list[RowSlice] = []
    for row_slice in row_slices:
        if (stats := finished_row_slice(target, rekeying, row_slice)) is None:
            todo.append(row_slice)
        else:
            total.add(stats)
    read = 0
    with reporter.bar("read    ", sum(4 * row_slice.tokens for row_slice in todo)) as bar:
        for row_slice, stats in engine.run(partial(run_row_slice, target, rekeying), todo):
            total.add(stats)
            tokens = sum(total.tokens(split) for split in SPLITS)
            read += 4 * row_slice.tokens
            bar.update(read, f"{tokens:,} tokens")
    return total


def finished_manifest(output: Path, config_key: str, inputs_key: str) -> Manifest | None:
    """The manifest of an output that is finished already, or None."""
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(output)
    if (manifest.config_fingerprint, manifest.inputs_fingerprint) != (config_key, inputs_key):
        raise DataError(
            f"{output}: finished with other settings or from other directories; "
            "set another --out, or remove the directory"
        )
    return manifest


def check_outside(blend: Blend) -> None:
    """The output is not one of the inputs, nor in one, nor around one."""
    output = blend.output.resolve()
    for directory in blend.directories:
        path = directory.resolve()
        if path == output or path in output.parents or output in path.parents:
            raise ConfigError(f"--out {blend.output}: overlaps {directory}; set another")


def join_files(inputs: Inputs, output: Path, name: str) -> None:
    """Write the lines that all directories have in a file of that name into one file."""
    path = output / name
    path.parent.mkdir(exist_ok=True)
    with open_atomic(path) as target:
        for directory in inputs.directories:
            if (directory / name).is_file():
                with (directory / name).open("rb") as source:
                    shutil.copyfileobj(source, target)


def count_shards(blend: Blend, stats: RowSliceStats) -> dict[str, int]:
    """The files of each split."""
    evaluation = -(-stats.weight(EVALUATION) // TOKENS_IN_EVALUATION_FILE)
    return {TRAIN: blend.shards, EVALUATION: evaluation}


def parse_weights(text: str, directories: int) -> tuple[float, ...]:
    """`3,1` as numbers, one for each directory."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--weights {text}: not numbers; write for example 3,1") from None
    if len(weights) != directories:
        raise ConfigError(f"--weights {text}: {len(weights)} for {directories} directories")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"--weights {text}: each must be above 0; leave out what is not wanted")
    return weights
