"""Whoever runs the work, once or twice, in time or too late: the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.dataprep.shards.blend_inputs import Blend
from headrace.dataprep.shards.repartition import repartition
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.jobs.commands.options import EngineName, open_engine
from headrace.jobs.tools.spark_zip import write_zip
from headrace.schemas.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]
KINDS = ("causal", "preference")
FEW_TASKS = {"block_bytes": 1 << 17, "deduplicate": {}}  # Spark takes a second for a few


class KilledError(Exception):
    """Stands for a kill at this moment."""


class TwiceEngine:
    """Attempts each item twice at the same time, as Spark does with what is slow."""

    def __init__(self, pool):
        self.pool = pool

    def run(self, function, items):
        for item in items:
            first, second = self.pool.submit(function, item), self.pool.submit(function, item)
            assert first.result() == second.result()
            yield item, first.result()


class LateEngine:
    """Keeps a second attempt of each item for later; may be killed after some results."""

    def __init__(self, survives=None):
        self.survives = survives
        self.late = []

    def run(self, function, items):
        for item in items:
            if self.survives is not None and len(self.late) == self.survives:
                raise KilledError
            self.late.append((function, item))
            yield item, function(item)

    def run_late(self):
        """Run all second attempts; none may get to write."""
        for function, item in self.late:
            with pytest.raises(FileNotFoundError):
                function(item)


class HalfEngine:
    """Lets a first attempt of each item publish a few files and die, and then makes another."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.died = 0

    def run(self, function, items):
        for number, item in enumerate(items):
            with self.monkeypatch.context() as patch:
                patch.setattr(Path, "replace", self.replace_some(number % 5))
                try:
                    function(item)
                except KilledError:
                    self.died += 1
            yield item, function(item)

    def replace_some(self, count):
        """`Path.replace` that works so many times; notes for the bar do not count."""
        replace, left = Path.replace, iter(range(count))

        def replace_some(path, target):
            if Path(target).suffix != ".progress" and next(left, None) is None:
                raise KilledError
            return replace(path, target)

        return replace_some


@pytest.fixture
def two_processes():
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_two_attempts_at_the_same_time_leave_what_one_does(
    kind, two_processes, mixed_config, run_on
):
    twice = run_on(TwiceEngine(two_processes), mixed_config("twice", kind))
    assert twice == run_on(None, mixed_config("once", kind))


def test_attempts_that_die_halfway_leave_nothing_that_counts(mixed_config, run_on, monkeypatch):
    engine = HalfEngine(monkeypatch)
    assert run_on(engine, mixed_config("half")) == run_on(None, mixed_config("once"))
    assert engine.died > 40


def test_an_attempt_that_comes_too_late_changes_nothing(mixed_config, run_on, snapshot):
    engine = LateEngine()
    right = run_on(engine, mixed_config("out"))
    engine.run_late()
    assert snapshot("out") == right


def test_attempts_of_an_earlier_run_are_shut_out(mixed_config, run_on, snapshot):
    killed = LateEngine(survives=5)
    with pytest.raises(KilledError):
        run_on(killed, mixed_config("out", sequence_len=32))

    class NextEngine(LateEngine):
        def run(self, function, items):
            killed.run_late()
            return super().run(function, items)

    right = run_on(None, mixed_config("right"))
    assert run_on(NextEngine(), mixed_config("out")) == right


def test_repartition_withstands_two_attempts_too(two_processes, mixed_config, run_on, snapshot):
    run_on(None, mixed_config("out"))
    for name, engine in {"twice": TwiceEngine(two_processes), "late": LateEngine()}.items():
        blend = Blend((Path("out"),), Path(name), shards=5)
        repartition(blend, engine)
    assert snapshot("twice") == snapshot("late")


@pytest.mark.parametrize(
    ("kind", "partitions", "changes"),
    [("causal", (None, 3), {}), ("causal", (1,), {"max_tokens": 5_000}), ("preference", (1,), {})],
)
def test_spark_writes_the_bytes_that_processes_write(
    kind, partitions, changes, mixed_config, run_on, spark
):
    right = run_on(None, mixed_config("local", kind, **changes))
    for count in partitions:
        spark.partitions = count
        assert run_on(spark, mixed_config(f"spark-{count}", kind, **changes)) == right


def test_results_that_arrive_while_one_is_used_are_not_lost():
    from headrace.dataprep.work.spark_engine import SparkJob

    found = [(0, "a")]
    job = SparkJob(None, None, SimpleNamespace(value=found), 3, None)
    results = job.results()
    assert next(results) == (0, "a")
    found += [(1, "b"), (0, "again"), (2, "c")]
    job.ended.set()
    assert list(results) == [(1, "b"), (2, "c")]


def die_once(flag):
    """Be killed, as when memory is short, unless that has happened before."""
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return flag.name


def test_spark_runs_again_what_was_lost_with_a_worker(spark, tmp_path):
    spark.partitions = None
    flags = [tmp_path / name for name in "ab"]
    assert sorted(spark.run(die_once, flags)) == [(flag, flag.name) for flag in flags]


def test_a_worker_that_is_killed_ends_the_run_with_one_line(tmp_path):
    with (
        closing(LocalEngine(2)) as engine,
        pytest.raises(
            DataError, match=r"^a worker process died \(killed, or out of memory\); run a"
        ),
    ):
        list(engine.run(die_once, [tmp_path / name for name in "ab"]))


def test_what_spark_finished_is_kept_by_either_engine(mixed_config, run_on, spark):
    spark.partitions = None

    class KilledSpark:
        def run(self, function, items):
            for number, found in enumerate(spark.run(function, items)):
                if number == 7:
                    raise KilledError
                yield found

    with pytest.raises(KilledError):
        run_on(KilledSpark(), mixed_config("out"))
    kept = {path: path.stat().st_mtime_ns for path in Path("out/.work").glob("*.done.json")}
    assert len(kept) >= 7
    with pytest.raises(KilledError):
        run_on(LateEngine(survives=2), mixed_config("out"))
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in Path("out/.work").iterdir()}.items()
    assert run_on(spark, mixed_config("out")) == run_on(None, mixed_config("right"))


def test_an_error_on_an_executor_is_the_users_one_line(mixed_config, run_on, spark, corpus):
    (corpus / "more.jsonl.gz").write_bytes((corpus / "more.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"^corpus/more\.jsonl\.gz: cannot be read to its end"):
        run_on(spark, mixed_config("out"))


def break_down(item):
    """Fail in a way that no user can mend."""
    raise ZeroDivisionError(f"at {item}")


def test_a_failure_that_is_nobodys_mistake_names_its_reason(spark):
    with pytest.raises(DataError, match=r"^Spark gave up \(ZeroDivisionError: at 4\); run again"):
        list(spark.run(break_down, [4]))


def test_without_pyspark_the_error_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("headrace.jobs.commands.options.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"^pyspark is not .*: pip install '\.\[spark\]'"),
        open_engine(EngineName.SPARK, 2),
    ):
        pass


def as_toml(keys):
    """A config as TOML, each table in one line."""
    return "\n".join(f"{key} = {as_value(value)}" for key, value in keys.items())


def as_value(value):
    """A value as TOML writes it in one line."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {as_value(inner)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_value, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def zipped(mixed_config, tmp_path):
    """`headrace.zip` and `prepare.toml` in the working directory."""
    write_zip(tmp_path / "headrace.zip")
    keys = mixed_config("out", **FEW_TASKS).model_dump(exclude_defaults=True)
    Path("prepare.toml").write_text(as_toml(keys | {"max_reject_fraction": 0.0}))


@pytest.fixture
def submit(zipped):
    """The output of `spark-submit`, given only the zip, over a config and with options."""
    program = Path(pytest.importorskip("pyspark").__file__).parent / "bin" / "spark-submit"
    command = [program, "--master", "local[2]", "--py-files", "headrace.zip"]
    command += [ROOT / "jobs" / "cli.py", "prepare", "prepare.toml", "--engine", "spark"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}

    def submit(*options):
        return subprocess.run(
            [*map(str, command), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return submit


ZIP_ALONE = """
import sys
sys.path.insert(0, "headrace.zip")
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
from headrace.jobs import cli
cli.main(["prepare", "prepare.toml", "--workers", "1", "--set", "max_reject_fraction=0.1"])
ours = [module for name, module in sys.modules.items() if name.startswith("headrace.")]
assert ours and all("headrace.zip" in (module.__file__ or "headrace.zip") for module in ours)
"""


def test_the_zip_alone_prepares(zipped, mixed_config, run_on):
    """Without Spark; with it see the next test."""
    done = subprocess.run(
        [sys.executable, "-c", ZIP_ALONE],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    right = run_on(None, mixed_config("right", **FEW_TASKS))
    assert {p: Path("out", p).read_bytes() for p in right} == right


@pytest.mark.exhaustive
def test_spark_submit_needs_only_the_zip(submit, mixed_config, run_on):
    done = submit("--set", "max_reject_fraction=0.1")
    assert done.returncode == 0, done.stderr
    right = run_on(None, mixed_config("right", **FEW_TASKS))
    assert {p: Path("out", p).read_bytes() for p in right} == right


@pytest.mark.exhaustive
def test_spark_submit_shows_one_line_of_an_error_and_goes_on_after_it(submit, mixed_config, run_on):
    refused = submit()
    assert refused.returncode != 0
    shown = refused.stdout.splitlines()  # where spark-submit puts what its driver writes to stderr
    assert shown[-1].startswith("error: 2 of 1145 documents refused, more than max_reject_fraction")
    assert "Traceback" not in refused.stdout + refused.stderr
    assert "\tat " not in refused.stdout + refused.stderr
    done = submit("--set", "max_reject_fraction=0.1")
    assert done.returncode == 0, done.stderr
    assert "tasks are done already" in done.stdout
    right = run_on(None, mixed_config("right", **FEW_TASKS))
    assert {p: Path("out", p).read_bytes() for p in right} == right


WORKERS_SCRIPT = """
from headrace.dataprep.work.local_engine import LocalEngine
if __name__ == "__main__":
    assert sorted(result for _, result in LocalEngine(2).run(abs, [-1, -2])) == [1, 2]
"""


def test_workers_import_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("numpy", "pydantic", "json"):
        (tmp_path / "data" / f"{name}.py").write_text("open('ran', 'w')")
    (tmp_path / "script.py").write_text(WORKERS_SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(tmp_path / "script.py")]
    subprocess.run(command, cwd=tmp_path / "data", env=environment, check=True)
    assert not (tmp_path / "data" / "ran").exists()
