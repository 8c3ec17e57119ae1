"""Directories of pictures through every pass: the same bytes in any way, and balanced ledgers."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from headrace.dataprep.dry_run import estimate
from headrace.dataprep.shards.blend_inputs import Blend
from headrace.dataprep.shards.repartition import repartition
from headrace.dataprep.shards.verify import verify
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.jobs.console.inspection import inspect
from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest

SCRIPT = """
import sys
from pathlib import Path
from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text())
    prepare(config, workers=2)
"""


def question(number, pictures):
    names = [f"{(number + place) % 12}.png" for place in range(pictures)]
    return [
        {"user": ["<image>" * pictures + f" Question {number}?", *names]},
        {"assistant": f"a red circle left of a blue square, {number}"},
    ]


@pytest.fixture
def many(config, write_rows):
    """A config over three dozen rows of none to three pictures in many tasks, some of them bad."""
    rows = [question(number, number % 4) for number in range(36)]
    rows[7] = [{"user": ["<image>", "missing.png"]}, {"assistant": "x"}]
    rows[26] = [{"user": "plain"}, {"assistant": "a text"}]
    write_rows(rows)

    def many(output="out", **changes):
        values = {"block_bytes": 1 << 11, "evaluation_fraction": 0.2, "sequence_len": 96}
        images = {"row_group_bytes": 1 << 14, **changes.pop("images", {})}
        return config(output=output, images=images, **values | changes)

    return many


def totals(directory):
    """The pictures of all rows, by the rows themselves."""
    tables = [pq.read_table(path) for path in sorted(Path(directory).glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    return sum(len({tile["picture"] for tile in row["images"] or []}) for row in rows)


def check(directory):
    """The directory is sound and its ledger balanced."""
    assert verify(Path(directory)) == []
    ledger = read_manifest(Path(directory)).images.ledger
    assert ledger.difference() == 0
    assert sum(ledger.pictures_out.values()) == totals(directory)
    return ledger


def test_many_workers_write_the_bytes_that_one_writes(many, run, snapshot):
    run(many("one"), workers=1)
    run(many("many"), workers=3)
    assert snapshot("many") == snapshot("one")
    assert len(read_manifest(Path("one")).split("evaluation")) == 1
    ledger = check("one")
    assert ledger.pictures_dropped == {"refused: missing picture": 1}
    assert ledger.pictures_in == sum(number % 4 for number in range(36)) - 7 % 4 - 26 % 4 + 1


def test_a_killed_run_goes_on_to_the_same_bytes(many, run, snapshot):
    run(many("right"))
    Path("script.py").write_text(SCRIPT)
    Path("config.json").write_text(many("killed").model_dump_json())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "script.py", "config.json"],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(list(Path("killed").glob(".work/task-*.done.json"))) < 2:
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(many("killed"))
    assert snapshot("killed") == snapshot("right")


@pytest.mark.exhaustive
def test_spark_writes_the_same_bytes(many, run_on, spark):
    with closing(LocalEngine(1)) as engine:
        right = run_on(engine, many("one"))
    for partitions in (None, 1, 3):
        spark.partitions = partitions
        assert run_on(spark, many(f"spark-{partitions}")) == right


def test_row_groups_end_by_the_bytes_of_their_pictures(many, run):
    run(many("by-bytes", shards=1, packing="none"))
    run(many("by-rows", shards=1, packing="none", images={"row_group_bytes": 1 << 30}))
    small, large = (read_manifest(Path(name)).shards[0] for name in ("by-bytes", "by-rows"))
    assert len(small.row_groups) > len(large.row_groups) == 1
    assert small.rows == large.rows
    assert max(group.bytes for group in small.row_groups) < 2 << 14


def test_equal_documents_have_equal_pictures_too(config, run, write_rows):
    same, other = question(1, 1), question(1, 1)
    other[0]["user"] = [other[0]["user"][0], "5.png"]
    write_rows([same, same, other, question(2, 0), question(2, 0)])
    run(config(shards=1, deduplicate={"exact": True}, packing="none"))
    assert read_manifest(Path("out")).shards[0].rows == 3
    assert check("out").pictures_dropped == {"exact duplicate": 1}


def test_limits_and_filters_count_the_pictures_that_they_leave_out(many, run):
    run(many("limited", max_rows=5))
    assert check("limited").pictures_dropped["left out by limits"] > 0
    run(many("filtered", filters={"min_tokens": 75}))
    assert check("filtered").pictures_dropped["filter min_tokens"] > 0
    sources = [
        {"name": "drawn", "type": "chat", "path": "rows.jsonl", "sample_fraction": 0.5},
    ]
    run(many("sampled", sources=sources))
    assert check("sampled").pictures_dropped["left out by sample_fraction"] > 0


def blend(*directories, output, shards, **options):
    what = Blend(tuple(map(Path, directories)), Path(output), shards, **options)
    with closing(LocalEngine(1)) as engine:
        return repartition(what, engine)


def test_repartitioning_gives_what_prepare_gives_with_that_many_shards(many, run, snapshot):
    run(many("two", shards=2))
    run(many("five", shards=5))
    blend("two", output="again", shards=5, seed=0)
    right = snapshot("five")
    del right["report.html"]
    assert snapshot("again") == right


def test_blends_carry_pictures_on_and_refuse_other_settings(many, run, config):
    run(many("one"))
    run(many("two", seed=4))
    blend("one", "two", output="both", shards=3, weights=(1, 2))
    assert check("both").pictures_dropped["left out by weight"] > 0
    run(many("other", images={"processor": {"max_pixels": 28 * 28 * 20}}))
    with pytest.raises(DataError, match="other: images"):
        blend("one", "other", output="no", shards=3)


def test_pictures_are_shown(many, run):
    run(many())
    page = Path("out/report.html").read_text()
    assert '<img src="data:image/png;base64,' in page
    assert "Pictures by fate (qwen2_vl)" in page
    console = Console(file=io.StringIO(), width=100)
    inspect(Path("out"), 3, console)
    shown = console.file.getvalue()
    assert "pictures, for qwen2_vl" in shown
    assert "picture 0: " in shown
    assert "<|image_pad|><|image_pad|><|image_pad|><|image_pad|>" not in shown


def test_a_ledger_that_is_off_is_found(many, run):
    run(many())
    manifest = read_manifest(Path("out"))
    images = manifest.images
    out = images.ledger.pictures_out | {"train": images.ledger.pictures_out["train"] + 1}
    ledger = images.ledger.model_copy(update={"pictures_out": out})
    changed = images.model_copy(update={"ledger": ledger})
    write_manifest(Path("out"), manifest.model_copy(update={"images": changed}))
    problems = verify(Path("out"))
    assert any("the picture ledger is off by -1" in problem for problem in problems)
    assert any("train pictures, the shards" in problem for problem in problems)


def test_an_estimate_counts_pictures_among_the_bytes(many):
    assert estimate(many(), workers=1).stored_bytes > 20_000
