"""A run that stands still is reported while it does, with the rank that the others wait for."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headrace.jobs.commands.ranks import Rank, open_reports
from headrace.jobs.commands.stalls import Stalls
from headrace.trainer.failure import LauncherPipe

SECONDS = 120  # after which a loaded machine has failed, too
# rank 0 waits for a transfer; rank 1 hangs in a function of its own
PROGRAM = """\
import os, time
from headrace.trainer import failure
failure.SAMPLE_SECONDS = failure.REPORT_SECONDS = 0.05
class Work:
    wait = time.sleep
def hang():
    time.sleep(60)
def main(complain):
    Work.wait(60) if os.environ["RANK"] == "0" else hang()
failure.run_rank(main)
"""


@pytest.fixture
def ranks(tmp_path):
    """Two ranks that the launcher knows, after each has told where it is."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []
    for number in range(2):
        reads, writes = open_reports()
        environment = os.environ | {"RANK": str(number), "HEADRACE_REPORT_FD": str(writes)}
        command = [sys.executable, str(tmp_path / "program.py")]
        process = subprocess.Popen(command, env=environment, pass_fds=(writes,))
        os.close(writes)
        started.append(Rank(number, process, reads))
    deadline = time.monotonic() + SECONDS
    while not all("at" in rank.told for rank in started):
        [rank.poll() for rank in started]
        assert time.monotonic() < deadline
    yield started
    for rank in started:
        rank.process.kill()
        rank.process.wait()
        os.close(rank.reports)


def report(ranks, watch):
    deadline = time.monotonic() + SECONDS
    while True:
        for rank in ranks:
            rank.poll()
        if text := watch.poll():
            return text
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_rank_that_the_others_wait_for_is_named_first(ranks):
    text = report(ranks, Stalls(ranks, still_seconds=0.5))
    first, busy, waiting = text.split("; ")
    assert first.startswith("nothing has moved for ")
    assert busy.startswith("rank 1 is in hang (") and "program.py:7)" in busy
    assert waiting.startswith("rank 0 waits in main (")


def test_a_stopped_process_is_named(ranks):
    os.kill(ranks[1].pid, signal.SIGSTOP)
    text = report(ranks, Stalls(ranks, still_seconds=0.5, deaf_seconds=0.3))
    assert f"; rank 1 does not answer: process {ranks[1].pid} is stopped; rank 0 waits" in text


def test_a_run_that_moves_is_not_reported(ranks):
    watch = Stalls(ranks)
    for _ in range(3):  # the other has stood still for long
        [rank.poll() for rank in ranks]
        ranks[0].moved = time.monotonic()
        ranks[1].moved = time.monotonic() - 3600
        assert watch.poll() is None


def test_it_is_told_once_for_each_doubling(ranks):
    watch = Stalls(ranks)
    told = []
    for minutes in (0.5, 1.1, 1.5, 2.1, 3.9, 4.1):
        for rank in ranks:
            rank.moved = time.monotonic() - 60 * minutes
        told.append(watch.poll() is not None)
    assert told == [False, True, False, True, False, True]


def test_nothing_is_told_under_another_launcher(monkeypatch):
    monkeypatch.delenv("HEADRACE_REPORT_FD", raising=False)
    assert not LauncherPipe().tell(at="here")


def test_a_rank_that_nobody_hears_any_more_goes_on(monkeypatch):
    reads, writes = open_reports()
    monkeypatch.setenv("HEADRACE_REPORT_FD", str(writes))
    launcher = LauncherPipe()
    assert launcher.tell(at="here")
    assert json.loads(os.read(reads, 100)) == {"at": "here"}
    os.close(reads)
    assert not launcher.tell(at="there")
    os.close(writes)
