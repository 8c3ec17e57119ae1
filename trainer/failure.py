"""Handling of a rank's failure: it ends at once, and only the first failing rank speaks.

The launcher of `headrace train` gives each rank a pipe, and hears on it where the rank is and why
it ends; a JSON object a line.
"""

import json
import linecache
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO

from headrace.schemas.publish import NO_ROOM

REPORT_VARIABLE = "HEADRACE_REPORT_FD"
ECHOES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "NCCL",
    "remote process exited",
)
GRACE_SECONDS = 10.0
SAMPLE_SECONDS = 1.0
REPORT_SECONDS = 3.0
LONGEST_REASON = 2000  # characters; a pipe takes 4,096 bytes at once
WAITS = (".wait(", "barrier(", ".recv(", "synchronize(")


class LauncherPipe:
    """Tells the launcher where this rank is; does nothing under another launcher."""

    def __init__(self) -> None:
        number = os.environ.get(REPORT_VARIABLE)
        self.fd = int(number) if number else None

    def tell(self, **facts: object) -> bool:
        """Send facts, if there is somebody to hear them; returns whether there is."""
        if self.fd is None:
            return False
        try:
            os.write(self.fd, json.dumps(facts).encode() + b"\n")
        except OSError:
            return False  # full, or the launcher is gone
        return True

    def complain(self, mistake: str) -> None:
        """Say what the user did wrong: the launcher says it last, or nobody else does."""
        if not self.tell(mistake=mistake[:LONGEST_REASON], failed_at=time.monotonic()):
            print_mistake(mistake)

    def blame(self, error: BaseException) -> None:
        """Say what went wrong with this rank."""
        text = "".join(traceback.format_exception_only(error)).strip()
        self.tell(error=text[:LONGEST_REASON].splitlines()[0], failed_at=time.monotonic())

    def watch_main_thread(self) -> None:
        """Tell every few seconds where the main thread is, and whether it moves."""
        if self.fd is not None:
            main = threading.get_ident()
            threading.Thread(target=self._watch, args=(main,), daemon=True).start()

    def _watch(self, main: int) -> None:
        seen: object = None
        moved = told = 0.0
        while True:
            now = time.monotonic()
            frame = sys._current_frames().get(main)
            if (place := stack_of(frame)) != seen:
                seen, moved = place, now
            if frame is not None and now - told >= REPORT_SECONDS:
                told = now
                self.tell(at=describe(frame), waits=waits(frame), still=now - moved)
            del frame  # or what it refers to would live on
            time.sleep(SAMPLE_SECONDS)


def run_rank(main: Callable[[Callable[[str], None]], int]) -> NoReturn:
    """Run a rank's `main` and end the process with its code, 1 after an exception.

    A failed rank does not wait for its threads and process groups, which may never end.

    Args:
        main: is given what to tell of a mistake of the user's.
    """
    code = 1
    launcher = LauncherPipe()
    launcher.watch_main_thread()
    threading.excepthook = report_thread
    try:
        code = main(launcher.complain)
    except Exception as error:  # noqa: BLE001 (the process boundary: it is printed)
        if is_echo(error):
            wait_to_be_ended()
        traceback.print_exception(error)
        launcher.blame(error)
    for stream in (sys.stdout, sys.stderr):
        flush(stream)
    if code:
        os._exit(code)
    launcher.tell(done=True)
    sys.exit(0)


def report_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for a full disk: TensorBoard's thread tells the main one."""
    error = failure.exc_value
    if not (isinstance(error, OSError) and error.errno in NO_ROOM):
        threading.__excepthook__(failure)


def print_mistake(mistake: str) -> None:
    """Say on standard error what the user did wrong."""
    sys.stderr.write(f"error: {mistake}\n")


def flush(stream: TextIO) -> None:
    """Write out what waits; what nobody reads any more, as after a closed terminal, is dropped."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def stack_of(frame: FrameType | None) -> list[tuple[int, int]]:
    """Return where each call of a stack is, innermost first."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def describe(frame: FrameType) -> str:
    """Return the innermost place of a stack, and the one of ours that led there."""
    place = f"in {frame.f_code.co_name} ({short(frame)})"
    ours: FrameType | None = frame
    while ours is not None and "headrace" not in str(ours.f_globals.get("__name__")):
        ours = ours.f_back
    if ours is None or ours is frame:
        return place
    return f"{place}, called by {ours.f_code.co_name} ({short(ours)})"


def short(frame: FrameType) -> str:
    """Return file and line, the file with its folder."""
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


def waits(frame: FrameType) -> bool:
    """Return whether the innermost line of a stack waits for another rank or for the device."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return "torch/distributed/" in frame.f_code.co_filename or any(text in line for text in WAITS)


def is_echo(error: BaseException) -> bool:
    """Return whether an error only says that another rank is gone, as gloo's and NCCL's do."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ECHOES)


def wait_to_be_ended() -> None:
    """Keep quiet until the launcher, which sees the rank that failed first, ends this one.

    Its line is then the last one the user sees. Without a launcher that does so, go on and tell.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)
