"""Runs work on this machine. Engines only decide who runs what: all give the same bytes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Protocol, TypeVar

import pyarrow as pa

from headrace.schemas.errors import DataError
from headrace.schemas.shards.arrow_numbers import leave_pandas_out

PRELOADED = ["headrace.dataprep.passes.task_runner", "headrace.dataprep.passes.merge_runs"]
SAFE_PATH = "PYTHONSAFEPATH"  # https://docs.python.org/3/using/cmdline.html

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Engine(Protocol):
    """Whoever calls a picklable function on many items; both travel to the workers."""

    def run(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]
    ) -> Iterator[tuple[ItemT, ResultT]]:
        """Each item with its result, in the order in which they finish."""
        ...


class LocalEngine:
    """Processes of this machine; with one worker, this process with the tokenizer's own threads.

    The processes are started by the first run that needs them, and serve all runs until `close`.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]
    ) -> Iterator[tuple[ItemT, ResultT]]:
        """Each item with its result, in the order in which they finish."""
        todo = list(items)
        if min(self.workers, len(todo)) <= 1:
            for item in todo:
                yield item, function(item)
            return
        yield from self.run_in_processes(function, todo)

    def run_in_processes(
        self, function: Callable[[ItemT], ResultT], items: list[ItemT]
    ) -> Iterator[tuple[ItemT, ResultT]]:
        """The same in processes forked from one that has imported all and has no threads."""
        self.pool = self.pool or ProcessPoolExecutor(
            min(self.workers, len(items)),
            mp_context=fork_server(),
            initializer=prepare_worker,
            initargs=(dict(os.environ),),
        )
        try:
            with interrupts_held_back():
                futures = {self.pool.submit(function, item): item for item in items}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died (killed, or out of memory); run again to continue, "
                "with fewer workers if memory was short"
            ) from None

    def close(self) -> None:
        """End the processes; what has not begun is not begun."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


def fork_server() -> ForkServerContext:
    """Return the context whose processes begin with the modules of tasks and shards.

    One process imports them, half a second of a core, and is forked for each worker. It runs
    nothing else: forking a process that has threads, as this one, may hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with interrupts_held_back(), safe_path():
        forkserver.ensure_running()
    return context


@contextmanager
def safe_path() -> Iterator[None]:
    """Keep Python processes that begin meanwhile from importing modules of the working folder."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits; processes started meanwhile inherit that until they are ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def prepare_worker(environment: dict[str, str]) -> None:
    """One thread a worker, a quiet end on Ctrl-C, and no life after the parent's death.

    Args:
        environment: of the parent, which may have changed since the server of forks began.
    """
    os.environ.clear()
    os.environ.update(environment)
    use_one_thread()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with_parent, daemon=True).start()


def start_light() -> None:
    """Spare a process of the pool the import of pandas; the caller's own process may need it."""
    if multiprocessing.parent_process() is not None:
        leave_pandas_out()


def use_one_thread() -> None:
    """Keep a worker's libraries to one thread, before they start more."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)


def die_with_parent() -> None:
    """Wait for the parent to end, and end: an orphan would go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
