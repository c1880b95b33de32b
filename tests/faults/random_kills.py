"""A run that is started and killed again and again, at random moments, with warm starts."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from dist_lm.errors import StopRequested
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.rank_scenarios import launch_here

_LONGEST_S, _MOST_STEPS = 3.0, 8


class Killer:
    """Kills one rank, or all of them, once in each attempt."""

    def __init__(self, run: Path, chance: random.Random) -> None:
        self.run, self.chance = RunDir(run), chance
        self.kills = 0

    def attempt(self, recipe: Path, num_ranks: int) -> int:
        """One attempt, killed; the exit code tells whether the run was done before."""
        return launch_here(recipe, self.run.path, num_ranks=num_ranks, meanwhile=lambda: self._kill_once(num_ranks))

    def _kill_once(self, num_ranks: int) -> None:
        """After a random time, which may be before the first step, or after a random number of steps."""
        ranks = self._ranks(num_ranks)
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0.0, _LONGEST_S))
        else:
            target, attempt = self.chance.randrange(1, _MOST_STEPS), self.run.next_attempt()
            while self._steps_of(attempt) < target:
                time.sleep(0.02)
        victims = ranks if self.chance.random() < 0.3 else [self.chance.choice(ranks)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        self.kills += 1

    def _ranks(self, num_ranks: int) -> list[int]:
        """Processes of all ranks, once they are there."""
        while len(found := multiprocessing.active_children()) < num_ranks:
            time.sleep(0.01)
        return [int(process.pid or 0) for process in found]

    def _steps_of(self, attempt: int) -> float:
        if self.run.next_attempt() <= attempt or "from_step" not in (facts := self.run.attempt_facts(attempt)):
            return 0
        return max((record["step"] for record in read_metrics(self.run.metrics, "train")), default=0) - int(
            facts["from_step"]
        )


def kill_again_and_again(
    recipe: Path, run: Path, worlds: Sequence[int], *, most: int, minutes: float, chance: random.Random
) -> int:
    """Up to `most` kills within `minutes`, then an attempt that is asked to stop; the kills that happened."""
    killer = Killer(run, chance)
    deadline = time.monotonic() + minutes * 60
    while killer.kills < most and time.monotonic() < deadline:
        killer.attempt(recipe, chance.choice(worlds))
    code = launch_here(recipe, run, num_ranks=max(worlds), meanwhile=lambda: _stop_once_resumed(RunDir(run)))
    assert code == StopRequested.exit_code
    return killer.kills


def _stop_once_resumed(run_dir: RunDir) -> None:
    attempt = run_dir.next_attempt()
    while run_dir.next_attempt() <= attempt or "from_step" not in run_dir.attempt_facts(attempt):
        time.sleep(0.05)
    run_dir.stop_file.touch()
