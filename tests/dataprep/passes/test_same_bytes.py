"""The same config gives the same bytes, whoever does the work and however often it is cut short."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.dataprep.passes import merge_runs, task_runner
from headrace.schemas.errors import DataError

SCRIPT = """
import sys
from pathlib import Path
from headrace.dataprep.prepare import prepare
from headrace.jobs.console.reporter import ConsoleReporter
from headrace.schemas.prepare.prepare_config import PrepareConfig
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text())
    try:
        prepare(config, int(sys.argv[2]), ConsoleReporter())
    except KeyboardInterrupt:
        sys.exit(130)
"""


PACKINGS = {  # of rows of 128 tokens, which some documents exceed
    "concatenate": {},
    "best_fit": {"packing": "best_fit", "overlong": "truncate", "sequence_len": 128},
}


@pytest.fixture
def make_config(make_config):
    """Many small tasks, so that there is a moment between them."""
    return functools.partial(make_config, block_bytes=2048)


def start(config, workers, **options):
    """`prepare` in a process of its own."""
    Path("script.py").write_text(SCRIPT)
    Path("config.json").write_text(config.model_dump_json())
    command = [sys.executable, "script.py", "config.json", str(workers)]
    options = {"stdout": subprocess.DEVNULL, "start_new_session": True} | options
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, **options)


def kill_when(process, output, pattern, count):
    """SIGKILL once so many files of the working folder match; it must not have finished before."""
    deadline = time.monotonic() + 60
    while len(list(Path(output, ".work").glob(pattern))) < count:
        assert process.poll() is None, "finished before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path(output, "manifest.json").exists()


@pytest.mark.parametrize(("kind", "workers"), [("causal", 2), ("preference", 4)])
def test_many_workers_write_the_bytes_that_one_writes(kind, workers, mixed_config, run, snapshot):
    run(mixed_config("one", kind), workers=1)
    run(mixed_config("many", kind), workers=workers)
    assert snapshot("one") == snapshot("many")


@pytest.mark.parametrize(("workers", "packing"), [(2, "concatenate"), (1, "best_fit")])
def test_a_run_killed_twice_and_continued_writes_the_same_bytes(
    workers, packing, corpus, make_config, run, snapshot
):
    whole = run(make_config("whole", **PACKINGS[packing]))
    assert bool(whole.ledger.tokens_dropped) == (packing != "concatenate")
    config = make_config("killed", **PACKINGS[packing])
    tasks = random.randrange(2, 60)
    kill_when(start(config, workers), "killed", "task-*.done.json", tasks)
    markers = {
        path.name: path.stat().st_mtime_ns for path in Path("killed/.work").glob("*.done.json")
    }
    process = start(config, workers)
    kill_when(process, "killed", "shard-*.done.json", random.randrange(1, 3))
    for name, written in markers.items():
        assert Path("killed/.work", name).stat().st_mtime_ns == written, "finished work was redone"
    run(config)
    assert snapshot("killed") == snapshot("whole")


def test_a_search_for_duplicates_killed_at_every_stage_continues_to_the_same_bytes(
    corpus, make_config, run, snapshot
):
    settings = {"deduplicate": {"exact": True, "near": True}, "filters": {"min_characters": 150}}
    whole = run(make_config("whole", **settings))
    assert set(whole.ledger.tokens_dropped) == {"filter min_characters", "near duplicate"}
    config = make_config("killed", **settings)
    kill_when(start(config, 2), "killed", "encoded-*.done.json", random.randrange(2, 60))
    kill_when(start(config, 1), "killed", "duplicates-*.done.json", 1)
    kill_when(start(config, 2), "killed", "task-*.done.json", random.randrange(2, 40))
    run(config)
    assert snapshot("killed") == snapshot("whole")


@pytest.mark.parametrize("packing", ["best_fit"])
def test_rows_held_in_memory_do_not_change_bytes(packing, corpus, make_config, run, snapshot):
    run(make_config("large", **PACKINGS[packing]))
    few = {"held_tokens": 100, "gathered_tokens": 500, "slices_at_once": 2}
    few["long_row"] = 1  # rows of these tests are short
    run(make_config("small", **PACKINGS[packing]), **few)
    assert snapshot("small") == snapshot("large")


@pytest.mark.parametrize("packing", ["concatenate"])
def test_merging_the_files_of_tasks_first_does_not_change_bytes(
    packing, corpus, make_config, run, snapshot, monkeypatch
):
    run(make_config("direct", **PACKINGS[packing]))
    # three times over, into files of few batches
    few = {"most_files": 2, "merged_tokens": 3000, "gathered_tokens": 500}
    merged = []
    merge = merge_runs.merge_runs
    monkeypatch.setattr(merge_runs, "merge_runs", lambda *a: merged.append(a[1]) or merge(*a))
    run(make_config("merged", **PACKINGS[packing]), **few)
    assert {plan.merged.level for plan in merged} >= {1, 2}
    assert any(plan.merged.ranges > 1 for plan in merged)
    assert snapshot("merged") == snapshot("direct")


def test_a_finished_directory_is_reused_untouched(corpus, make_config, run):
    first = run(make_config())
    written = Path("out/shard-00000.parquet").stat().st_mtime_ns
    assert run(make_config()) == first
    assert Path("out/shard-00000.parquet").stat().st_mtime_ns == written


def test_a_run_killed_while_it_cleans_up_ends_clean(corpus, make_config, run, snapshot):
    run(make_config())
    whole = snapshot("out")
    for left in ("out/.work", "out/..work.removed"):
        Path(left).mkdir()
        Path(left, "lock").write_text("1")
    run(make_config())
    assert snapshot("out") == whole


@pytest.mark.parametrize("changes", [{"seed": 2}, {"packing": "best_fit"}], ids=str)
def test_work_of_another_config_is_not_trusted(changes, corpus, make_config, run, snapshot):
    run(make_config("right", **changes))
    kill_when(start(make_config(shards=9), 1), "out", "shard-*.done.json", 5)
    run(make_config(**changes))
    assert snapshot("out") == snapshot("right")


def test_an_input_that_changed_between_two_tries_is_read_again(corpus, make_config, run, snapshot):
    kill_when(start(make_config(), 1), "out", "task-*.done.json", 20)
    (corpus / "000.txt").write_text("0 " + "stone " * 12)
    run(make_config())
    run(make_config("right"))
    assert snapshot("out") == snapshot("right")


def test_an_input_that_changes_while_it_is_read_stops_the_run(
    corpus, make_config, run, monkeypatch
):
    def process_and_append(*arguments):
        with (corpus / "000.txt").open("a") as file:
            file.write("more")
        return process_block(*arguments)

    process_block = task_runner.process_block
    monkeypatch.setattr(task_runner, "process_block", process_and_append)
    with pytest.raises(DataError, match=r"^corpus/000\.txt: changed while it was read; run again$"):
        run(make_config())


def test_raising_the_reject_limit_keeps_finished_tasks(corpus, make_config, run):
    (corpus / "050.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        run(make_config())
    written = {p: p.stat().st_mtime_ns for p in Path("out/.work").glob("task-*.done.json")}
    process = start(make_config(max_reject_fraction=0.1), 1)
    kill_when(process, "out", "shard-*.done.json", 1)
    assert written == {p: p.stat().st_mtime_ns for p in Path("out/.work").glob("task-*.done.json")}


def test_a_second_run_on_the_same_output_is_refused_until_the_first_dies(corpus, make_config, run):
    process = start(make_config(), 1)
    while not list(Path("out/.work").glob("task-*.done.json") if Path("out").exists() else []):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match=f"out: process {process.pid} is preparing it; wait"):
            run(make_config())
    finally:
        process.kill()
        process.wait()
    run(make_config())
    assert Path("out/manifest.json").exists()


def test_ctrl_c_ends_with_one_line_and_the_run_can_go_on(corpus, make_config, run, snapshot):
    process = start(make_config(), 2, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(Path("out/.work").glob("task-*.done.json") if Path("out").exists() else []):
        time.sleep(0.001)
    time.sleep(random.random() / 4)  # the second worker may still be starting
    os.killpg(process.pid, signal.SIGINT)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "out: stopped; run the same command to continue"
    assert errors == ""
    run(make_config())
    run(make_config("right"))
    assert snapshot("out") == snapshot("right")


def test_workers_end_when_their_parent_is_killed(corpus, make_config):
    process = start(make_config(), 2)
    kill_when(process, "out", "task-*.done.json", 3)
    deadline = time.monotonic() + 10
    while children_of_script() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children_of_script()


def children_of_script():
    """Processes for workers that run in this test's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            here = (folder / "cwd").resolve() == Path.cwd()
            if here and b"multiprocessing" in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found
