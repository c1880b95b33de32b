"""Stopping on request: what one rank hears becomes one decision of all ranks.

Enters: SIGTERM or SIGINT, a file that `dist-lm stop` wrote, a time limit, a launcher that died.
Leaves: a flag that the loop adds up over the ranks each step.
Promises: the first signal only raises the flag; a second one ends the process at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BY_COMMAND = "dist-lm stop"
BY_PEER = "another rank was asked to stop"


def first_hand(reasons: Iterable[str]) -> list[str]:
    """Of the reasons of all ranks those that no rank has from another one."""
    return [reason for reason in reasons if reason not in ("", BY_PEER)]


class StopFlag:
    """Raised by a signal of this process, or by `request`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reason = ""
        self._asked_at = 0.0

    @property
    def reason(self) -> str:
        """Empty while nobody asked to stop."""
        return self._reason

    def is_asked(self) -> bool:
        return bool(self._reason)

    def request(self, reason: str) -> None:
        if not self._reason:
            self._asked_at = self._clock()
            self._reason = reason

    def waited_s(self) -> float:
        """Time since the first request; 0 while there is none."""
        return self._clock() - self._asked_at if self._reason else 0.0

    def listen(self) -> None:
        """Catch the stop signals.  Outside the main thread Python forbids it: then do nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        # A thread hears them: Python's own handlers would wait until the main thread comes back from a
        # collective, that is for a rank which waits for data.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _leave_to_the_thread)
        threading.Thread(target=self._hear, args=(heard,), name="dist_lm-signals", daemon=True).start()

    def _hear(self, heard: int) -> None:
        while numbers := os.read(heard, 1):
            if numbers[0] in STOP_SIGNALS:
                self.on_signal(numbers[0])

    def on_signal(self, number: int) -> None:
        """A first signal asks to stop, a second one ends the process."""
        if self._reason.startswith("SIG"):
            os._exit(128 + number)
        self.request(signal.Signals(number).name)


def _leave_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    """Python's default would end the process."""


def at_time_limit(stop: StopFlag, limit_s: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """A duty that asks to stop once `limit_s` have passed from now on."""
    began_at = clock()

    def look() -> None:
        if clock() - began_at >= limit_s:
            stop.request("the time limit")

    return look


def on_file(stop: StopFlag, path: Path, reason: str) -> Callable[[], None]:
    """A duty that asks to stop once the file is there."""

    def look() -> None:
        if path.exists():
            stop.request(reason)

    return look


def tell_all(stop: StopFlag, path: Path) -> Callable[[], None]:
    """A duty that puts a file there, for `on_file` of the others, once this rank was asked to stop.

    All ranks agree in the loop; this reaches those that wait for data, where there is no collective.
    """
    told: list[bool] = []

    def look() -> None:
        if stop.is_asked() and not told:
            told.append(True)
            path.touch()

    return look


def on_orphaned(stop: StopFlag, *, grandparent: bool) -> Callable[[], None]:
    """A duty that asks to stop once this process's launcher is gone.

    `grandparent`: also once the launcher's own parent is gone.  The program `deepspeed` starts
    another one that starts the ranks, and forwards no signal to either.  A preloaded server that forks
    ranks stands between them and their launcher, too, and outlives it.
    """
    parent = os.getppid()
    starter = multiprocessing.parent_process()
    grandparent = grandparent or (starter is not None and starter.pid != parent)
    above = _parent_of(parent) if grandparent else 0

    def look() -> None:
        if os.getppid() != parent or (grandparent and above > 1 and _parent_of(parent) != above):
            stop.request("the launcher is gone")

    return look


def within_budget(stop: StopFlag, budget_s: float, end: Callable[[], None]) -> Callable[[], None]:
    """A duty that calls `end` once a stop has taken longer than its budget."""

    def look() -> None:
        if stop.waited_s() > budget_s:
            end()

    return look


def _parent_of(pid: int) -> int:
    """Parent of a process; 0 where it cannot be told."""
    try:
        # The name in parentheses may hold spaces; the state and the parent follow it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
