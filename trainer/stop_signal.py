"""SIGTERM and SIGINT as a wish to stop after the current step."""

import signal
from types import FrameType


class StopSignal:
    """Remembers that a stop was asked for; a second SIGINT ends the process at once.

    `requested` is this process's own view, `agreed` what all ranks have settled on after a step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
