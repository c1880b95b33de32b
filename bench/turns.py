"""Programs that take turns on one machine: each runs alone for some seconds, then waits for the others.

Enters: commands.  Leaves: the stretches of time in which each ran.
Promises: all processes of a program are stopped and continued together, those too that it started; none
is left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Turns:
    """One program."""

    command: Sequence[str]
    log: Path
    environment: dict[str, str]
    stretches: list[tuple[float, float]] = field(default_factory=list)
    """(began, ended), by time.time()."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def seconds(self) -> float:
        return sum(ended - began for began, ended in self.stretches)

    def run(self, seconds: float) -> bool:
        """One turn; False once the program has ended."""
        began = time.time()
        if self.process is None:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        self._signal(signal.SIGCONT)
        alive = True
        try:
            self.process.wait(seconds)
            alive = False
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGSTOP)
        self.stretches.append((began, time.time()))
        return alive

    def active_s(self, moment: float) -> float:
        """Seconds that it had run until `moment`."""
        return sum(max(0.0, min(ended, moment) - began) for began, ended in self.stretches)

    def end(self) -> None:
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        send(with_descendants(self.process.pid), number)


def send(processes: Iterable[int], number: int) -> None:
    """A signal to each of them that has not ended meanwhile."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def with_descendants(root: int) -> list[int]:
    """A process and all that it started; launchers give ranks sessions of their own."""
    try:
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
