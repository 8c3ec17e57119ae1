"""The launcher starts ranks, passes a stop on, and leaves no process behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.jobs.commands.launch import launch, open_store
from headrace.schemas.errors import ConfigError

# each rank writes its pid to <folder>/<rank>, then does what its case says
RANK = """\
import os, pathlib, signal, subprocess, sys, time
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
if case == "raise" and rank == "1":
    from headrace.trainer.failure import run_rank
    def main(complain):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child").write_text(str(child.pid))
        raise MemoryError("no room\\nat all")
    run_rank(main)
if case == "mistake":
    from headrace.trainer.failure import run_rank
    run_rank(lambda complain: complain("train.toml: epochs: must be above 0") or 3)
if case == "leave" and rank == "1":
    os.write(int(os.environ["HEADRACE_REPORT_FD"]), b'{"at": "in f", "waits": false}\\n')
    sys.exit(0)
time.sleep(60)
"""
LAUNCHER = (
    "import sys; from headrace.jobs.commands.launch import launch; "
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


@pytest.mark.parametrize(
    ("case", "code", "line"),
    [
        ("fail", 7, "error: rank 1 failed with code 7"),
        ("killed", 137, "error: rank 1 was ended by SIGKILL; the machine may be out of memory"),
        ("raise", 1, "error: rank 1 failed with code 1: MemoryError: no room"),
        ("mistake", 3, "error: train.toml: epochs: must be above 0"),
        ("leave", 1, "error: rank 1 left with code 0 before its work was done"),
    ],
)
def test_the_last_line_names_the_rank_that_failed_and_why(folder, capfd, case, code, line):
    assert launch("rank_program", [case, str(folder)], 3) == code
    assert capfd.readouterr().err.splitlines()[-1] == line


def test_what_a_failed_rank_had_started_does_not_live_on(folder):
    assert launch("rank_program", ["raise", str(folder)], 3) == 1
    wait_until(lambda: not runs(int((folder / "child").read_text())))


def test_a_port_that_is_taken_is_said_before_a_rank_starts(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--master-port {port}: Address already in use"):
            launch("rank_program", ["environment", str(folder)], 2, port)
    assert not pids(folder)


def test_the_ranks_meet_on_the_loopback_interface_alone():
    with open_store(None, None) as store:
        assert store.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_stop_reaches_every_rank_once_and_ends_with_0(folder, number):
    launcher = start_launcher(folder, "save")
    launcher.send_signal(number)

    assert launcher.wait(20) == 0
    assert len(list(folder.glob("saved-*"))) == 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_wish_to_save_ends_nothing(folder, number):
    launcher = start_launcher(folder, "save")
    launcher.send_signal(number)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.terminate()
    assert launcher.wait(20) == 0


def test_a_closed_terminal_means_nothing_under_nohup(folder):
    program = ["nohup", sys.executable, "-c", LAUNCHER, "save", str(folder)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as launcher:
        wait_until(lambda: len(pids(folder)) == 3)
        launcher.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert launcher.poll() is None
        launcher.terminate()
    assert len(list(folder.glob("saved-*"))) == 3


@pytest.mark.parametrize(
    "number", [signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGABRT, signal.SIGRTMIN]
)
def test_no_signal_ends_the_launcher_without_its_ranks(folder, number):
    launcher = start_launcher(folder, "sleep")
    launcher.send_signal(number)
    launcher.wait(20)
    wait_until(lambda: not any(runs(pid) for pid in pids(folder)))


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
