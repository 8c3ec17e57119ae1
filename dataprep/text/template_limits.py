"""Limits of processor time and memory for templates, which come from outside."""

import functools
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from headrace.schemas.errors import DataError

SECONDS = 2.0  # of processor time for one conversation; it mostly takes less than a millisecond
MEGABYTES = 256  # that one conversation may take beside what the process has already
SIZES = Path("/proc/self/statm")  # its first number: the pages of this process's address space


class TooSlow(BaseException):
    """The time for one rendering is over; no Exception, so that nothing on the way catches it."""


@contextmanager
def limited(name: str, what: str = "one conversation") -> Iterator[None]:
    """Stop what takes longer than SECONDS of this process's own time, or more than MEGABYTES.

    Args:
        name: what error messages call the template.
        what: and what it does.

    Raises:
        DataError: it did; or this is not the main thread, which alone can be stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        raise DataError(
            f"{name}: chat templates are only rendered in a process's main thread, where an "
            "endless one can be stopped; call prepare there, or with more than one worker"
        )
    try:
        with time_limit(), memory_limit():
            yield
    except TooSlow:
        raise DataError(
            f"{name}: {what} took more than {SECONDS:g} s; correct the chat template, "
            "which may loop without end"
        ) from None
    except MemoryError:
        raise DataError(
            f"{name}: {what} took more than {MEGABYTES} MiB of memory; correct the chat template"
        ) from None


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooSlow after some seconds of processor time, that of the system for this process
    included, and again after a quarter of them: a finalizer in which it comes swallows it."""
    if signal.getsignal(signal.SIGPROF) is not stop_rendering:
        signal.signal(signal.SIGPROF, stop_rendering)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def stop_rendering(number: int, frame: FrameType | None) -> None:
    """Stop a rendering at the end of its time (a signal handler); one that has ended meanwhile
    has no interval any more, and is left alone."""
    if signal.getitimer(signal.ITIMER_PROF)[1]:
        raise TooSlow


@functools.lru_cache(maxsize=1)
def open_sizes(process: int) -> int:
    """Return the descriptor of a process's sizes, which tells them anew at each reading."""
    return os.open(SIZES, os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def memory_limit() -> Iterator[None]:
    """Let the address space grow by MEGABYTES and no more, where the system tells its size."""
    try:
        pages = int(os.pread(open_sizes(os.getpid()), 64, 0).split()[0])
    except OSError:  # macOS has neither this file nor the limit
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = pages * resource.getpagesize() + (MEGABYTES << 20)
    limits = [limit for limit in (allowed, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
