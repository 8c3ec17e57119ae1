"""The launcher starts ranks, passes a stop on, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.jobs.launch import launch

# each rank writes its pid to <folder>/<rank>, then does what its case says
RANK = """\
import os, pathlib, signal, sys, time
case, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ["RANK"]
if case == "save":
    def stop(number, frame):
        (folder / f"saved-{rank}").write_text("")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
(folder / f".{rank}").write_text(str(os.getpid()))
(folder / f".{rank}").rename(folder / rank)
if case == "environment":
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
    (folder / f"env-{rank}").write_text(" ".join(os.environ[name] for name in names))
    sys.exit(0)
while len(list(folder.glob("[0-9]"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
if case == "fail" and rank == "1":
    sys.exit(7)
if case == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
LAUNCHER = (
    "import sys; from headrace.jobs.launch import launch; "
    "sys.exit(launch('rank_program', sys.argv[1:], 3))"
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "rank_program.py").write_text(RANK)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return tmp_path


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("[0-9]")]


def runs(pid: int) -> bool:
    """Whether a process is alive; one that waits to be collected is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_launcher(folder: Path, case: str) -> subprocess.Popen[bytes]:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, case, str(folder)])
    wait_until(lambda: len(pids(folder)) == 3)
    return launcher


def test_every_rank_knows_its_place(folder):
    assert launch("rank_program", ["environment", str(folder)], 2) == 0
    assert (folder / "env-0").read_text() == "0 0 2 2 127.0.0.1"
    assert (folder / "env-1").read_text() == "1 1 2 2 127.0.0.1"


@pytest.mark.parametrize(("case", "code"), [("fail", 7), ("killed", 128 + signal.SIGKILL)])
def test_a_failing_rank_ends_the_others_and_gives_its_code(folder, case, code):
    assert launch("rank_program", [case, str(folder)], 3) == code
    assert not any(runs(pid) for pid in pids(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_rank_once_and_ends_with_0(folder, number):
    launcher = start_launcher(folder, "save")
    launcher.send_signal(number)

    assert launcher.wait(20) == 0
    assert len(list(folder.glob("saved-*"))) == 3


def test_a_second_interrupt_ends_ranks_that_do_not_stop(folder, monkeypatch):
    program = folder / "rank_program.py"
    program.write_text(program.read_text().replace("sys.exit(0)\n    signal", "pass\n    signal"))
    launcher = start_launcher(folder, "save")
    launcher.send_signal(signal.SIGINT)
    wait_until(lambda: len(list(folder.glob("saved-*"))) == 3)
    launcher.send_signal(signal.SIGINT)

    assert launcher.wait(20) == 128 + signal.SIGINT
    assert not any(runs(pid) for pid in pids(folder))


def test_no_rank_outlives_a_killed_launcher(folder):
    launcher = start_launcher(folder, "sleep")
    launcher.kill()
    launcher.wait()

    wait_until(lambda: not any(runs(pid) for pid in pids(folder)))
