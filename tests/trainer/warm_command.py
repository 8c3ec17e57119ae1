"""The `headrace` command, and ranks of a script, from a process that has imported everything.

A rank spends ten seconds of processor time on its imports, and a small run two on its steps. So
runs are forked here, on CPU, to their end (`run_warm`) or to be disturbed (`start_warm`). Of
what concerns the start itself, and of each signal, a test runs the real command, and tests compare
the two bit by bit.
"""

import atexit
import ctypes
import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIMIT_SECONDS = 200
CLONE_NEWNET = 0x40000000
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
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], limit)
    if not ready:
        close_server()
        raise TimeoutError(f"no end after {limit} s: {request['arguments']}")
    return int(server.stdout.readline())


def open_server() -> subprocess.Popen[str]:
    """The process that has imported everything; one for each process of pytest."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-u", __file__],
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


def serve() -> None:
    """Fork the commands that come in; answer each with its exit code, or with its process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    keepers: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        keepers = [keeper for keeper in keepers if not os.waitpid(keeper, os.WNOHANG)[0]]
        if "code" in request:
            keeper, answer = fork_keeper(request)
            keepers.append(keeper)
        else:
            answer = exit_code(fork(lambda request=request: run_command(request)))
        answers.write(f"{answer}\n")
        answers.flush()


def fork(work) -> int:
    """The process that does some work."""
    child = os.fork()
    if not child:
        leave(work)
    return child


def exit_code(child: int) -> int:
    """Of a process of ours, when it ends."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_keeper(request: dict) -> tuple[int, int]:
    """A process that waits for a command and writes down its exit code; and the command's own."""
    reads, writes = os.pipe()

    def keep() -> int:
        launcher = fork(lambda: run_command(request))
        os.write(writes, f"{launcher}\n".encode())
        path = Path(request["code"])
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.write_text(str(exit_code(launcher)))
        unfinished.rename(path)
        return 0

    keeper = fork(keep)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        return keeper, int(pipe.readline())


def import_everything() -> None:
    """What a rank imports, as it imports it; computes nothing, so no thread is started."""
    from headrace.trainer.quiet import import_without, quiet_libraries

    quiet_libraries()
    import_without("bitsandbytes", "hqq")

    import headrace.jobs.cli
    import headrace.jobs.launch
    import headrace.trainer.main
    import headrace.trainer.run.loop  # noqa: F401


def run_command(request: dict) -> int:
    """In a process of its own: the launcher, whose ranks are forked as well."""
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if request.get("host"):
        enter_namespace(request["host"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    from headrace.jobs import cli, launch

    launch.start_rank = fork_rank
    if request["script"]:
        return launch.launch(request["script"], request["arguments"], request["ranks"])
    cli.main(request["arguments"])
    return 0


def enter_namespace(name: str) -> None:
    """What `ip netns exec NAME` does with the network."""
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


class ForkedRank:
    """As much of `subprocess.Popen` as the launcher uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """The same, once it has ended."""
        return self._ended(0)

    def send_signal(self, number: int) -> None:
        """To the rank, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def fork_rank(
    command: list[str], environment: dict[str, str], rank: int, local_rank: int
) -> ForkedRank:
    """In place of `headrace.jobs.launch.start_rank`."""
    from headrace.jobs.launch import die_with

    prepare = die_with(os.getpid())
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return ForkedRank(child)
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    prepare()
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    logging.root.handlers.clear()  # the launcher's
    sys.argv = command[command.index("-m") + 1 :]
    leave(run_module)


def run_module() -> int:
    """What `python -m MODULE` does, or `python SCRIPT`."""
    name = sys.argv[0]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        sys.modules.pop(name, None)  # imported to be warm
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def leave(work) -> None:
    """Do a forked process's work and end it: nothing of its parent's may run on in it."""
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:  # noqa: BLE001 (the end of a process: it is printed)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve()
