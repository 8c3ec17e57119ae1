"""The `headrace` command, and ranks of a script, from a process that has imported everything.

A rank spends ten seconds of processor time on its imports, and a small run two on its steps. So
runs are forked here, on CPU, to their end (`run_warm`) or to be disturbed (`start_warm`). The
real command is run for what processes do as they start, for Ctrl-C, and for the loss of a rank;
test_resume.py compares the two bit by bit.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS = 200
SERVER = Path(__file__).with_name("warm_server.py")
_server: subprocess.Popen[str] | None = None


def run_warm(
    arguments: list[str], script: str | None = None, ranks: int = 1, limit: float = LIMIT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """`headrace ARGUMENTS` in this working directory and environment, to its end.

    Args:
        script: run so many ranks of it with these arguments instead.
        limit: in seconds.

    Raises:
        TimeoutError: it has not ended in time; it is killed.
    """
    work = {"arguments": arguments, "script": script, "ranks": ranks}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/stdout", f"{folder}/stderr"]
        place = {"cwd": str(Path.cwd()), "environment": dict(os.environ), "outputs": outputs}
        code = ask(work | place, limit)
        texts = [Path(path).read_text() for path in outputs]
    return subprocess.CompletedProcess(arguments, code, *texts)


class WarmLauncher:
    """As much of `subprocess.Popen` as tests use, for a launcher that goes on by itself."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._code = code

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def wait(self, timeout: float = LIMIT_SECONDS) -> int:
        """The same, once it has ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"launcher {self.pid}", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """To the launcher alone, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Its ranks die with it."""
        self.send_signal(signal.SIGKILL)


def start_warm(arguments: list[str], log: Path, host: str | None = None) -> WarmLauncher:
    """`headrace ARGUMENTS` in this working directory and environment; output is added to a log.

    Args:
        host: network namespace to be in.
    """
    log.touch()
    code = log.with_name(f".{log.name}-{time.monotonic_ns()}")
    work = {"arguments": arguments, "script": None, "ranks": 1, "code": str(code), "host": host}
    place = {
        "cwd": str(Path.cwd()),
        "environment": dict(os.environ),
        "outputs": [str(log), str(log)],
    }
    return WarmLauncher(ask(work | place, LIMIT_SECONDS), code)


def ask(request: dict[str, object], limit: float) -> int:
    """The exit code of one command, or the process of one that goes on by itself."""
    server = open_server()
    assert server.stdin is not None and server.stdout is not None
    answered = False
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answered = bool(select.select([server.stdout], [], [], limit)[0])
    finally:  # a test may also run out of its own time: the next one must not get this answer
        if not answered:
            close_server()
    if not answered:
        raise TimeoutError(f"no end after {limit} s: {request['arguments']}")
    return int(server.stdout.readline())


def open_server() -> subprocess.Popen[str]:
    """The process that has imported everything; one for each process of pytest."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-u", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        atexit.register(close_server)
    return _server


def close_server() -> None:
    """End it with what it has started."""
    if _server is not None and _server.poll() is None:
        os.killpg(_server.pid, signal.SIGKILL)  # its ranks die with their launcher
        _server.wait()
