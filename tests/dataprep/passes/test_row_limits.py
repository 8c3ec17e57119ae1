"""`max_rows` and `max_tokens`: exactly so many rows, chosen at random, the same by any engine."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

from headrace.dataprep.input.files import find_inputs
from headrace.dataprep.passes.limit_rank import ranks
from headrace.dataprep.planning import build_context, plan
from headrace.dataprep.shards.verify import verify
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest_file import read_manifest

SPLITS = ("train", "evaluation")


class KilledError(Exception):
    """Stands for a kill at this moment."""


class MortalEngine:
    """Dies after so many results."""

    def __init__(self, survives):
        self.left = survives

    def run(self, function, items):
        for item in items:
            if not self.left:
                raise KilledError
            self.left -= 1
            yield item, function(item)


@pytest.fixture
def sources(mixed_config):
    """The sources of the mixed config, each with other limits."""

    def sources(mill=None, records=None):
        own = mixed_config("unused").model_dump(mode="json", exclude_unset=True)["sources"]
        return [own[0] | (mill or {}), own[1] | (records or {})]

    return sources


def take(rows, max_rows=None, max_tokens=None):
    """What stays of rows by the limits, one row after the other in the order of their ranks."""
    keys = np.array([row["row_key"] for row in rows], np.uint64)
    kept, tokens = [], 0
    for index in np.argsort(ranks(keys, 0)):
        tokens += len(rows[index]["input_ids"])
        if len(kept) == max_rows or (max_tokens is not None and tokens > max_tokens):
            break
        kept.append(rows[index])
    return kept


CASES = {
    "rows of one, tokens of the other": ({"max_rows": 9}, {"max_tokens": 3000}, {}),
    "both, of both": ({"max_rows": 50, "max_tokens": 1999}, {"max_rows": 70}, {}),
    "in all": ({}, {}, {"max_rows": 33}),
    "of a source and in all": ({"max_tokens": 900}, {}, {"max_tokens": 5000, "max_rows": 500}),
    "more than there is": ({"max_rows": 10**6}, {"max_tokens": 10**9}, {"max_rows": 10**6}),
}


def test_the_rows_of_the_lowest_ranks_stay(sources, mixed_config, run, rows_of):
    merges = {"most_files": 4}  # so that files are merged
    run(mixed_config("all", sources=sources()), **merges)
    whole = read_manifest(Path("all")).ledger
    everything = {split: rows_of("all", split) for split in SPLITS}
    rows = [row for split in SPLITS for row in everything[split]]
    for name, (mill, records, top) in CASES.items():
        bits = 1 if name == "both, of both" else 10
        config = mixed_config(name, sources=sources(mill, records), **top)
        manifest = run(config, rank_bits=bits, **merges)
        wanted = take(
            [
                row
                for source, limits in (("mill", mill), ("records", records))
                for row in take([r for r in rows if r["source"] == source], **limits)
            ],
            **top,
        )
        keys = {row["row_key"] for row in wanted}
        for split in SPLITS:
            right = [row for row in everything[split] if row["row_key"] in keys]
            assert rows_of(name, split) == right, name
        assert verify(Path(name)) == []
        check_ledger(name, manifest.ledger, whole)


def check_ledger(name, ledger, whole):
    """What is left out is counted under the limits of the case."""
    mill, records, top = CASES[name]
    left = {r: n for r, n in ledger.tokens_dropped.items() if r not in whole.tokens_dropped}
    assert ledger.tokens_in == whole.tokens_in
    assert sum(left.values()) == sum(whole.tokens_out.values()) - sum(ledger.tokens_out.values())
    limits = {f"left out by {limit} of mill" for limit in mill}
    limits |= {f"left out by {limit} of records" for limit in records}
    assert left.keys() <= limits | {f"left out by {limit} of all sources" for limit in top}
    assert bool(left) == (name != "more than there is")


def test_what_stays_is_spread_over_all_shards(sources, mixed_config, run):
    manifest = run(mixed_config("out", sources=sources(), max_rows=90, shards=3))
    assert all(shard.rows > 15 for shard in manifest.split("train"))


def test_workers_and_kills_change_nothing(sources, mixed_config, run_on):
    changes = {"sources": sources({"max_rows": 30}, {"max_tokens": 4000}), "max_tokens": 5000}
    right = run_on(None, mixed_config("right", **changes))
    assert run_on(LocalEngine(2), mixed_config("two", **changes)) == right
    for survives in itertools.count(10, 10):
        try:
            assert run_on(MortalEngine(survives), mixed_config("out", **changes)) == right
            break
        except KilledError:
            assert not Path("out/manifest.json").exists()
    assert survives > 30, "killed in the passes over the keys as well"


def test_other_limits_keep_the_finished_work(sources, mixed_config, run_on):
    config = functools.partial(mixed_config, sources=sources())
    job = build_context(config("unused"))
    tasks = len(plan(job, find_inputs(job.config.sources)))
    with pytest.raises(KilledError):  # in the middle of the shards
        run_on(MortalEngine(tasks * 4), config("out", max_rows=10))
    kept = {p: p.stat().st_mtime_ns for p in Path("out/.work").glob("task-*.done.json")}
    assert len(kept) == tasks
    engine = MortalEngine(-1)
    assert run_on(engine, config("out", max_rows=20)) == run_on(None, config("right", max_rows=20))
    assert -1 - engine.left < 5 * tasks, "no task ran again"


@pytest.mark.parametrize(
    ("mill", "top", "message"),
    [
        ({"max_tokens": 1}, {}, 'source "mill": max_tokens of mill takes no row; raise it'),
        ({}, {"max_tokens": 1}, "max_rows and max_tokens leave no train row; raise them"),
    ],
)
def test_a_limit_below_the_first_row_is_an_error(mill, top, message, sources, mixed_config, run):
    with pytest.raises(DataError, match=f"^{message}"):
        run(mixed_config("out", sources=sources(mill), **top))
