"""`max_rows` and `max_tokens`: a random sample of exactly so many rows, in bounded memory.

The limits hold for train and evaluation rows together, and the rows with the lowest ranks stay, so
that the evaluation split keeps its share. What is in the files of finished tasks is counted by the
highest bits of its rank, then the one part in which a limit is passed by the next bits, until a
single row is found: three passes over the keys of a billion rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes.limit_rank import ALL, RowCuts, ranks
from headrace.dataprep.rows.picture_rows import (
    has_pictures,
    row_picture_bytes,
    row_pictures,
)
from headrace.dataprep.rows.task_stats import StatsSum, TaskStats, add_counts
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.local_engine import Engine
from headrace.dataprep.work.workspace import rows_path
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig
from headrace.schemas.shards.shard_format import SIDES, SPLITS

Counts = npt.NDArray[np.int64]


class Window(NamedTuple):
    """Ranks that begin with the bits `prefix`, told apart by `bits` more; `shift` bits are left."""

    prefix: int
    bits: int
    shift: int


class Item(NamedTuple):
    """A task whose rows are counted, and the rank from which on they are left out already."""

    task: int
    top: int


class Cut(NamedTuple):
    """Rows of a rank below `top` stay: how many, their tokens, and which limit the next passes."""

    top: int
    reason: str | None
    rows: int
    tokens: int


def limited(config: PrepareConfig) -> bool:
    """Return whether the config limits rows or tokens."""
    parts: list[PrepareConfig | SourceConfig] = [config, *config.sources]
    return any(limits_of(part) != (None, None) for part in parts)


def limits_of(part: PrepareConfig | SourceConfig) -> tuple[int | None, int | None]:
    """Most rows, most tokens."""
    return part.max_rows, part.max_tokens


def limit_rows(
    context: Context, tasks: list[Task], by_source: dict[str, TaskStats], engine: Engine
) -> tuple[RowCuts, dict[str, TaskStats]]:
    """Return the cuts that limits make, and the counts of each source without the rows cut off.

    Raises:
        DataError: a limit leaves no row of a source.
    """
    if not limited(context.config):
        return RowCuts(context.config.seed), by_source
    cuts = {
        source.name: cut_source(context, tasks, source, engine) for source in context.config.sources
    }
    for source in context.config.sources:
        if cuts[source.name].reason and cuts[source.name].rows == 0:
            raise DataError(
                f'source "{source.name}": {cuts[source.name].reason} takes no row; raise it'
            )
    items = [Item(task.number, cuts[task.source.name].top) for task in tasks]
    last = find_cut(
        partial(count_ranks, context, items, engine),
        context.config,
        "max_{} of all sources",
        context.space.budgets.rank_bits,
    )
    tops = {name: min(cut.top, last.top) for name, cut in cuts.items()}
    items = [Item(task.number, tops[task.source.name]) for task in tasks]
    kept = {name: StatsSum() for name in by_source}
    for item, stats in engine.run(partial(count_kept, context), items):
        kept[tasks[item.task].source.name].add(stats)
    ends = {task.source.name: task.number + 1 for task in tasks}
    return (
        RowCuts(context.config.seed, tuple(ends.values()), tuple(tops[name] for name in ends)),
        {
            name: without(stats, kept[name].total(), cuts[name], last)
            for name, stats in by_source.items()
        },
    )


def cut_source(context: Context, tasks: list[Task], source: SourceConfig, engine: Engine) -> Cut:
    """Find the cut that one source's own limits make."""
    items = [Item(task.number, ALL) for task in tasks if task.source.name == source.name]
    count = partial(count_ranks, context, items, engine)
    return find_cut(count, source, f"max_{{}} of {source.name}", context.space.budgets.rank_bits)


def find_cut(
    count: Callable[[Window], Counts],
    limits: PrepareConfig | SourceConfig,
    reason: str,
    rank_bits: int,
) -> Cut:
    """The rows of the lowest ranks that keep within the limits.

    Args:
        count: rows and tokens by the parts of a window, of shape [2, parts].
        reason: the name of a limit, with a place for what it counts.
        rank_bits: are told apart in one pass.
    """
    rows, tokens = limits_of(limits)
    if rows is None and tokens is None:
        return Cut(ALL, None, -1, -1)
    most = np.array([ALL >> 1 if limit is None else limit for limit in (rows, tokens)], np.uint64)
    taken, prefix, shift = np.zeros(2, np.uint64), 0, 64
    while shift:
        bits = min(rank_bits, shift)
        shift -= bits
        counts = count(Window(prefix, bits, shift)).astype(np.uint64)
        ends = taken[:, None] + np.cumsum(counts, axis=1, dtype=np.uint64)
        passed = ends > most[:, None]
        if not passed.any():
            return Cut(ALL, None, *map(int, ends[:, -1]))
        part = int(np.argmax(passed.any(axis=0)))
        taken = ends[:, part - 1] if part else taken
        prefix = prefix << bits | part
        if counts[0, part] == 1:
            break
    name = "rows" if passed[0, part] else "tokens"
    return Cut(prefix << shift, reason.format(name), *map(int, taken))


def count_ranks(context: Context, items: list[Item], engine: Engine, window: Window) -> Counts:
    """Rows and tokens of all items by the parts of a window, of shape [2, parts]."""
    total = np.zeros((2, 1 << window.bits), np.int64)
    for _, counts in engine.run(partial(count_task, context, window), items):
        total += counts
    return total


def count_task(context: Context, window: Window, item: Item) -> Counts:
    """Rows and tokens of one task by the parts of a window, of shape [2, parts]."""
    total = np.zeros((2, 1 << window.bits), np.int64)
    for split in SPLITS:
        for batch in read_batches(rows_path(context.output, item.task, split)):
            rank = ranks(batch.column("row_key").to_numpy(), context.config.seed)
            heads = rank >> np.uint64(window.shift)
            inside = below(rank, item.top) & (
                heads >> np.uint64(window.bits) == np.uint64(window.prefix)
            )
            part = (heads[inside] & np.uint64((1 << window.bits) - 1)).astype(np.int64)
            np.add.at(total[0], part, 1)
            np.add.at(total[1], part, row_tokens(batch)[inside])
    return total


def count_kept(context: Context, item: Item) -> TaskStats:
    """Rows, tokens and trained tokens by split of what stays of a task."""
    sums = StatsSum()
    for split in SPLITS:
        for batch in read_batches(rows_path(context.output, item.task, split)):
            stays = below(ranks(batch.column("row_key").to_numpy(), context.config.seed), item.top)
            if stays.any():
                sums.add(
                    TaskStats(
                        **kept_pictures(split, batch, stays),
                        rows={split: int(stays.sum())},
                        tokens={split: int(row_tokens(batch)[stays].sum())},
                        trained_tokens={split: int(row_trained(batch)[stays].sum())},
                    )
                )
    return sums.total()


def kept_pictures(
    split: str, batch: pa.RecordBatch, stays: npt.NDArray[np.bool_]
) -> dict[str, dict[str, int]]:
    """Return the counts of the pictures of what stays, if rows have any."""
    if not has_pictures(batch):
        return {}
    return {
        "pictures": {split: int(row_pictures(batch)[stays].sum())},
        "picture_bytes": {split: int(row_picture_bytes(batch)[stays].sum())},
    }


def without(stats: TaskStats, kept: TaskStats, own: Cut, last: Cut) -> TaskStats:
    """A source's counts, less its rows that do not stay; their tokens under the limit's name."""
    read, stay = sum(stats.tokens.values()), sum(kept.tokens.values())
    within = own.tokens if own.reason else read
    left = {own.reason: read - within, last.reason: within - stay}
    dropped = {f"left out by {reason}": tokens for reason, tokens in left.items() if tokens}
    lost = sum(stats.pictures.values()) - sum(kept.pictures.values())
    pictures = {"left out by limits": lost} if lost else {}
    return stats.model_copy(
        update={
            "rows": kept.rows,
            "tokens": kept.tokens,
            "trained_tokens": kept.trained_tokens,
            "tokens_dropped": add_counts([stats.tokens_dropped, dropped]),
            "pictures": kept.pictures,
            "picture_bytes": kept.picture_bytes,
            "pictures_dropped": add_counts([stats.pictures_dropped, pictures]),
        }
    )


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a task's rows, mapped and not read."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def below(rank: npt.NDArray[np.uint64], top: int) -> npt.NDArray[np.bool_]:
    """Mark the ranks that are lower than `top`, which may be above all of them."""
    return np.ones(len(rank), np.bool_) if top >= ALL else rank < np.uint64(top)


def row_tokens(rows: pa.RecordBatch | pa.Table) -> Counts:
    """Tokens of each row; of both sides where a row is a pair."""
    names = [ids for ids, _ in SIDES if ids in rows.schema.names]
    lengths = [pc.list_value_length(rows.column(name)).fill_null(0).to_numpy() for name in names]
    return np.sum(lengths, axis=0, dtype=np.int64)


def row_trained(batch: pa.RecordBatch) -> Counts:
    """Tokens with a loss in each row, of both sides where a row is a pair."""
    return np.sum(
        [
            marked(batch.column(ids), batch.column(mask))
            for ids, mask in SIDES
            if ids in batch.schema.names
        ],
        axis=0,
        dtype=np.int64,
    )


def marked(ids: pa.ListArray, mask: pa.ListArray) -> Counts:
    """Marked tokens of each row, all tokens of rows without a mask."""
    lengths = pc.list_value_length(ids).fill_null(0).to_numpy().astype(np.int64)
    if mask.null_count == len(mask):
        return lengths
    ends = np.append(0, np.cumsum(mask.values.to_numpy(zero_copy_only=False), dtype=np.int64))
    offsets = mask.offsets.to_numpy()
    missing = mask.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, lengths, ends[offsets[1:]] - ends[offsets[:-1]])
