"""Stopping on request: a signal to any rank becomes one decision of all ranks.

Enters: SIGTERM or SIGINT.  Leaves: a flag that the loop adds up over the ranks each step.
Promises: the first signal only raises the flag; a second one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Raised by a signal of this process, or by `request`."""

    def __init__(self) -> None:
        self._reason = ""

    @property
    def reason(self) -> str:
        """Empty while nobody asked to stop."""
        return self._reason

    def request(self, reason: str) -> None:
        self._reason = self._reason or reason

    def listen(self) -> None:
        """Catch the stop signals.  Outside the main thread Python forbids it: then do nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._reason:
            os._exit(128 + number)
        self.request(signal.Signals(number).name)
