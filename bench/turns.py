"""Parties that take turns on one machine: each runs alone for some seconds, then stands still for the others.

Enters: commands, or processes that run already.  Leaves: the stretches of time in which each ran.
Promises: all processes of a party are stopped and continued together, those too that it started; of a
program that was started here none is left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


class EndedEarly(Exception):
    """A program that takes turns has ended."""


@dataclass
class Turns:
    """Of processes that somebody else starts and ends."""

    processes: Callable[[], Iterable[int]]
    stretches: list[tuple[float, float]] = field(default_factory=list)
    """(began, ended), by time.time()."""

    @property
    def seconds(self) -> float:
        return sum(ended - began for began, ended in self.stretches)

    def run(self, seconds: float) -> None:
        """One turn; they stand still when it ends."""
        self.go_on()
        began = time.time()
        time.sleep(seconds)
        self.stretches.append((began, time.time()))
        self.stand_still()

    def stand_still(self) -> None:
        send(self.processes(), signal.SIGSTOP)

    def go_on(self) -> None:
        send(self.processes(), signal.SIGCONT)

    def inside(self, moments: Iterable[float], *, settles_s: float = 0.0) -> list[list[float]]:
        """The moments in each of its turns, but for the first `settles_s` seconds of it."""
        found = sorted(moments)
        return [[at for at in found if began + settles_s <= at <= ended] for began, ended in self.stretches]

    def active_s(self, moment: float) -> float:
        """Seconds that they had run until `moment`."""
        return sum(max(0.0, min(ended, moment) - began) for began, ended in self.stretches)


class Program(Turns):
    """Of a program that starts with its first turn."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        super().__init__(self._started)
        self.command, self.log, self.environment = command, log, environment
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, seconds: float) -> None:
        """One turn.  Raises EndedEarly where the program has ended."""
        if self.process is None:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        super().run(seconds)
        if self.process.poll() is not None:
            raise EndedEarly(f"{' '.join(self.command[:4])} ended early:\n{self.log.read_text()[-2000:]}")

    def end(self) -> None:
        if self.process is not None:
            send(self._started(), signal.SIGKILL)
            self.process.wait()

    def _started(self) -> list[int]:
        return [] if self.process is None else with_descendants(self.process.pid)


def take_turns(parties: Sequence[Turns], seconds: float, *, until: Callable[[], bool]) -> None:
    """Rounds of turns of `seconds` each; in each round another party is the first."""
    first = 0
    while not until():
        for turns in [*parties[first:], *parties[:first]]:
            turns.run(seconds)
        first = (first + 1) % len(parties)


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
