"""The process behind `warm_command.py`: imports everything once, then forks launchers and ranks."""

import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

CLONE_NEWNET = 0x40000000
# imported by a rank within functions, with all that they import; half a second in each rank
WHEN_NEEDED = (
    "headrace.trainer.batches.loader_builder",
    "headrace.trainer.pipeline.interleaved_engine",
    "headrace.trainer.pipeline.prompted_answers",
    "headrace.trainer.pipeline.rejected_answers",
    "headrace.trainer.run.evaluation_sets",
    "headrace.trainer.run.open_session",
    "headrace.trainer.vision.arrangement",
    "headrace.trainer.vision.trained",
    "deepspeed.module_inject.auto_ep_layer",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "torch.profiler._cupti_monitor",
    "transformers.models.auto.image_processing_auto",
)


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
    import headrace.jobs.commands.launch
    import headrace.trainer.main
    import headrace.trainer.run.loop  # noqa: F401

    for name in WHEN_NEEDED:
        import_module(name)
    gc.collect()
    gc.freeze()  # else each rank goes over a million objects, and so copies their pages


def run_command(request: dict) -> int:
    """In a process of its own: the launcher, whose ranks are forked as well."""
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if request.get("host"):
        enter_namespace(request["host"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    from headrace.jobs import cli
    from headrace.jobs.commands import launch, ranks

    ranks.start_rank = fork_rank
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
    command: list[str],
    environment: dict[str, str],
    rank: int,
    local_rank: int,
    fds: tuple[int, ...] = (),  # inherited
) -> ForkedRank:
    """In place of `headrace.jobs.commands.ranks.start_rank`."""
    from headrace.jobs.commands.ranks import die_with

    prepare = die_with(os.getpid())
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return ForkedRank(child)
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
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
