"""The long form of "the same bytes": every engine, and 26 runs killed at random moments."""

import functools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from headrace.dataprep.work.local_engine import LocalEngine

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1800)]

KILLS = {"local": 10, "spark": 3}  # of each kind
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
SCRIPT = """
import sys
from pathlib import Path
from headrace.dataprep.prepare import prepare
from headrace.jobs.commands.data import EngineName, open_engine
from headrace.schemas.prepare.prepare_config import PrepareConfig
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text())
    with open_engine(EngineName(sys.argv[2]), int(sys.argv[3])) as engine:
        prepare(config, engine=engine)
"""


MERGED = {"most_files": 8}  # fewer than there are, so that they are merged before the shards


CASES = [
    {"packing": "concatenate"},
    {"packing": "best_fit", "sequence_len": 512, "overlong": "truncate", "max_tokens": 50_000},
    {"mix_sources": True},
    {"kind": "preference", "max_rows": 200},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_engines_agree(case, mixed_config, run_on, spark):
    mixed_config = functools.partial(mixed_config, block_bytes=1 << 13, **case)
    right = run_on(LocalEngine(1), mixed_config("one"), **MERGED)
    for workers in (2, 4):
        with closing(LocalEngine(workers)) as engine:
            assert run_on(engine, mixed_config(f"local-{workers}"), **MERGED) == right
    for partitions in (None, 1, 2, 3, 8, 100):
        spark.partitions = partitions
        assert run_on(spark, mixed_config(f"spark-{partitions}"), **MERGED) == right


@pytest.mark.parametrize("kind", ["causal", "preference"])
@pytest.mark.parametrize("engine", ["local", "spark"])
def test_runs_killed_at_random_moments_and_continued(engine, kind, mixed_config, run_on, snapshot):
    """Half of the kills with causal rows, half with pairs."""
    right = run_on(None, mixed_config("right", kind))
    Path("script.py").write_text(SCRIPT)
    Path("config.json").write_text(mixed_config("out", kind).model_dump_json())
    started = time.monotonic()
    finish(engine)
    seconds = time.monotonic() - started
    assert snapshot("out") == right
    killed, number = 0, 0
    while killed < KILLS[engine]:
        number += 1
        Path("out").rename(f"finished-{number}")
        # until it finishes: what is left to do becomes less with each kill
        while kill_once(engine, seconds * random.uniform(0.1, 1)):
            killed += 1
        finish(engine)
        assert snapshot("out") == right, f"after {killed} kills"
    logging.info("%s, %s: %d kills, finished %d times", engine, kind, killed, number)


def start(engine):
    """`prepare` in a session, and so a process group, of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "script.py", "config.json", engine, "2"]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, start_new_session=True, **output)


def finish(engine):
    """Run to the end."""
    assert start(engine).wait() == 0


def kill_once(engine, seconds):
    """Kill the whole group after so many seconds; whether it had not finished by then."""
    process = start(engine)
    try:
        assert process.wait(seconds) == 0
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, random.choice(SIGNALS))
        assert process.wait() != 0
        return True
