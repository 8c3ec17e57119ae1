"""Handling of a rank's failure: it ends at once, and only the first failing rank prints."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from headrace.schemas.publish import NO_ROOM

ECHOES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "NCCL",
    "remote process exited",
)
GRACE_SECONDS = 10.0


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Run a rank's `main` and end the process with its code, 1 after an exception.

    A failed rank does not wait for its threads and process groups, which may never end.
    """
    threading.excepthook = report_thread
    code = 1
    try:
        code = main()
    except Exception as error:  # noqa: BLE001 (the process boundary: it is printed)
        if is_echo(error):
            wait_to_be_ended()
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def report_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for a full disk: TensorBoard's thread tells the main one."""
    error = failure.exc_value
    if not (isinstance(error, OSError) and error.errno in NO_ROOM):
        threading.__excepthook__(failure)


def is_echo(error: BaseException) -> bool:
    """Return whether an error only says that another rank is gone, as gloo's and NCCL's do."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ECHOES)


def wait_to_be_ended() -> None:
    """Keep quiet until the launcher, which sees the rank that failed first, ends this one.

    Its line is then the last one the user sees. Without a launcher that does so, go on and tell.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)
