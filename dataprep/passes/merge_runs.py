"""Merging of the tasks' files into fewer and larger ones, before a large corpus becomes shards.

A shard that gathers its rows from n files reads a piece of each. With the files of all tasks there
would be tasks x shards pieces, of a few hundred bytes for 10 TB of text. Merged into about the root
of their number they are large again, at the price of writing and reading the rows once more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel

from headrace.dataprep.passes.limit_rank import RowCuts
from headrace.dataprep.passes.shard_writer import ShardPlan, Target, finished_shard, write_shard
from headrace.dataprep.passes.sorted_runs import ALL_KEYS, KeyRange, Runs, cut_keys
from headrace.dataprep.text.fast_tokenizer import close_tokenizers
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.local_engine import Engine
from headrace.dataprep.work.reporter import Reporter
from headrace.dataprep.work.workspace import read_marker, remove_stale_shards, write_marker
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import rename_durably
from headrace.schemas.shards.manifest import ShardRecord


class Sized(Protocol):
    """Work of a known size."""

    @property
    def size(self) -> int:
        """Tokens."""
        ...


PlanT = TypeVar("PlanT", bound=Sized)
ResultT = TypeVar("ResultT")


class Merged(BaseModel):
    """Content of a merged file's marker."""

    rows: int


@dataclass(frozen=True)
class MergePlan:
    """One file to write: the rows with keys in one range, of one group of files of `runs`."""

    runs: Runs
    merged: Runs
    group: int
    key_range: int

    @property
    def name(self) -> str:
        """The name of its marker."""
        return f"merge-{self.merged.level}.{self.group}.{self.key_range}.{self.runs.split}"

    @property
    def work_key(self) -> str:
        """Return the key of the work that decides its rows."""
        return fingerprint([asdict(self.runs), asdict(self.merged)])

    @property
    def keys(self) -> KeyRange:
        """The keys of its rows."""
        return cut_keys(ALL_KEYS, self.merged.ranges)[self.key_range]

    @property
    def groups(self) -> range:
        """Return the adjoining groups that it takes rows from; equal keys keep their order."""
        return range(
            self.runs.groups * self.group // self.merged.groups,
            self.runs.groups * (self.group + 1) // self.merged.groups,
        )

    @property
    def size(self) -> int:
        """Its share of the tokens."""
        return self.runs.tokens // (self.merged.groups * self.merged.ranges)


def write_shards(
    target: Target, splits: Sequence[tuple[Runs, int]], engine: Engine, reporter: Reporter
) -> list[ShardRecord]:
    """The records of all shards, in order, from the rows of each split and its number of shards."""
    plans: list[ShardPlan] = []
    for runs, count in splits:
        merged = merge_all(target, runs, engine, reporter) if count else runs
        plans += [ShardPlan(merged, index, count) for index in range(count)]
    remove_stale_shards(target.space.output, {plan.file for plan in plans})
    return run_plans(
        "shuffle ",
        plans,
        partial(finished_shard, target),
        partial(write_shard, target),
        engine,
        reporter,
    )


def merge_all(target: Target, runs: Runs, engine: Engine, reporter: Reporter) -> Runs:
    """Merge files until they are few enough."""
    while merged := next_level(runs, target.space.budgets):
        plans = [
            MergePlan(runs, merged, group, key_range)
            for group in range(merged.groups)
            for key_range in range(merged.ranges)
        ]
        done, write = partial(finished_merge, target), partial(merge_runs, target)
        run_plans("merge   ", plans, done, write, engine, reporter)
        runs = merged
    return runs


def run_plans(
    title: str,
    plans: list[PlanT],
    finished: Callable[[PlanT], ResultT | None],
    write: Callable[[PlanT], ResultT],
    engine: Engine,
    reporter: Reporter,
) -> list[ResultT]:
    """The result of each plan, in order; what an earlier run finished is kept."""
    done = {plan: result for plan in plans if (result := finished(plan))}
    todo = [plan for plan in plans if plan not in done]
    counts, written = f"{len(plans)} files", 0
    with reporter.bar(title, sum(4 * plan.size for plan in todo)) as bar:
        bar.update(written, counts)
        for plan, result in engine.run(write, todo):
            done[plan] = result
            written += 4 * plan.size
            bar.update(written, counts)
    return [done[plan] for plan in plans]


def next_level(runs: Runs, budgets: Budgets) -> Runs | None:
    """Return the runs that the files are to be merged into, or None if they are few enough."""
    if runs.groups <= budgets.most_files:
        return None
    groups = math.isqrt(runs.groups)
    ranges = max(1, runs.tokens // groups // budgets.merged_tokens)
    return replace(
        runs, level=runs.level + 1, groups=groups, ranges=ranges, cuts=RowCuts(runs.cuts.seed)
    )


def finished_merge(target: Target, plan: MergePlan) -> Merged | None:
    """The marker of a file that an earlier run finished, or None."""
    return read_marker(target.space.output, plan.name, plan.work_key, Merged)


def merge_runs(target: Target, plan: MergePlan) -> Merged:
    """Write one file of the next level, sorted throughout."""
    close_tokenizers()
    output = target.space.output
    path = plan.merged.path(output, plan.group, plan.key_range)
    unfinished = target.space.temporary(path)
    rows = 0
    with pa.ipc.new_file(str(unfinished), target.schema) as writer:
        for part in plan.runs.read_sorted(
            target.space, plan.groups, plan.keys, plan.size, target.schema
        ):
            writer.write_table(part.copy())
            rows += len(part.order)
    if (first := finished_merge(target, plan)) is not None:
        return first  # another attempt's; the file may be in use by now
    rename_durably(unfinished, path)
    merged = Merged(rows=rows)
    write_marker(target.space, plan.name, plan.work_key, merged)
    return merged
