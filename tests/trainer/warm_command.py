"""The `headrace` command, and ranks of a script, from a process that has imported everything.

A rank spends ten seconds of processor time on its imports, and a small run two on its steps. So
runs that are only compared with each other are forked here, on CPU. Whatever concerns processes,
signals or the start itself runs the real command, and tests compare the two bit by bit.
"""

import atexit
import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

LIMIT_SECONDS = 200
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


def ask(request: dict[str, object], limit: float) -> int:
    """The exit code of one command."""
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
    """Run the commands that come in one after the other; answer each with its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            leave(lambda request=request: run_command(request))
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


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
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    from headrace.jobs import cli, launch

    launch.start_rank = fork_rank
    if request["script"]:
        return launch.launch(request["script"], request["arguments"], request["ranks"])
    cli.main(request["arguments"])
    return 0


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
