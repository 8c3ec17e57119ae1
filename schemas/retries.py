"""Asks a storage that may fail or hang: again after a pause, a bounded number of times."""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.error import HTTPError

from headrace.schemas.errors import StorageError

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds; doubled after each failure
LONGEST_PAUSE = 30.0
FINAL_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
FINAL_MESSAGES = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Retry policy: `attempts` attempts of at most `timeout` seconds each, `pause` between."""

    attempts: int
    timeout: float
    pause: Callable[[float], None] = time.sleep  # takes seconds
    first_pause: float = FIRST_PAUSE

    def ask(self, what: str, operation: Callable[[], T]) -> T:
        """The result of `operation`, tried again after each `OSError` that may pass.

        Raises:
            StorageError: `what` failed to the last attempt, or was refused.
            FileNotFoundError: it is not there, which no further attempt would change.
        """
        try:
            return self.repeat(what, lambda: within(self.timeout, operation))
        except FileNotFoundError:
            raise
        except OSError as error:
            if is_final(error):
                raise StorageError(
                    f"{what}: refused ({reason_of(error)}); check credentials"
                ) from None
            raise StorageError(
                f"{what}: failed {self.attempts} times, the last time with: {reason_of(error)}; "
                "check the network and the storage, then continue with --resume"
            ) from None

    def repeat(self, what: str, operation: Callable[[], T]) -> T:
        """The same for an operation that bounds its own time; raises its last error as it is."""
        for attempt in range(1, self.attempts):
            try:
                return operation()
            except OSError as error:
                if is_final(error):
                    raise
                seconds = self.pause_after(attempt)
                logger.warning("%s: %s; trying again in %.1f s", what, reason_of(error), seconds)
                self.pause(seconds)
        return operation()

    def pause_after(self, attempt: int) -> float:
        """Seconds to wait: doubled each time, and of random length so that ranks spread out."""
        longest = min(LONGEST_PAUSE, self.first_pause * 2 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)


def reason_of(error: OSError) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def is_final(error: OSError) -> bool:
    """Return whether an error will not go away by trying again."""
    if isinstance(error, HTTPError):
        return error.code < 500
    return isinstance(error, FINAL_ERRORS) or any(text in str(error) for text in FINAL_MESSAGES)


def within(seconds: float, operation: Callable[[], T]) -> T:
    """Run in a thread of its own and wait so long for it; one that hangs is left behind.

    The client libraries' own timeouts are not enough: Arrow's S3 client has none for reads on
    Linux ("This option is ignored on non-Windows, non-macOS systems").

    Raises:
        TimeoutError: no result in time.
    """
    done: queue.SimpleQueue[tuple[bool, T | BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, operation()))
        except BaseException as error:  # noqa: BLE001 (handed over, and raised in the caller)
            done.put((False, error))

    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        good, result = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if good:
        return result  # type: ignore[return-value]
    raise result  # type: ignore[misc]
