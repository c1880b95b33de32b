"""A run that is started and killed again and again, at random moments, with warm starts; beside a calm one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_lm.errors import StopRequested
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.sample_log import VARIABLE, samples_by_step
from dist_lm.status import status_of
from tests.gloo_ranks import losses, train_locally, write_recipe
from tests.rank_scenarios import launch_here

SAME, CHANGING = ([2], 200, 0.8), ([1, 2, 3], 50, 0.2)
"""World sizes, kills, share of the minutes."""
_LONGEST_S, _MOST_STEPS = 3.0, 8
_DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
_GENTLE = {"optim__lr": 2e-4}
"""Sums of other numbers of ranks round otherwise, and hundreds of large steps would enlarge that beyond 1e-5."""


@dataclass(frozen=True)
class Soaked:
    """A run that was killed, against the calm one."""

    run: Path
    facts: dict[str, Any]


def soaked(data: Path, folder: Path, worlds: Sequence[int], *, most: int, minutes: float, seed: int) -> Soaked:
    """Kill a run up to `most` times, on ranks of `worlds` by chance, then train the same one in peace."""
    options: dict[str, Any] = {
        **{"zero": 2, "run__save_every": 3, "batch__micro": 8, "optim__schedule": {"kind": "constant"}},
        **(_DROPOUT if len(worlds) == 1 else _GENTLE),
    }
    run, calm, samples, calm_samples = (folder / name for name in ("run", "calm/run", "samples", "calm/samples"))
    samples.mkdir(parents=True)
    calm_samples.mkdir(parents=True)
    recipe = write_recipe(folder / "recipe.yaml", data, run__steps=10**6, **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(VARIABLE, str(samples))
        kills = kill_again_and_again(recipe, run, worlds, most=most, minutes=minutes, chance=random.Random(seed))
    status, killed = status_of(RunDir(run)), losses(run)
    calm_recipe = write_recipe(calm.parent / "recipe.yaml", data, run__steps=max(killed), **options)
    done = train_locally(calm_recipe, env={VARIABLE: str(calm_samples)}, timeout_s=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(calm)
    got, wanted = (Counter(itertools.chain(*samples_by_step(one).values())) for one in (samples, calm_samples))
    facts = {
        "world_sizes": list(worlds),
        "kills": kills,
        "attempts": len(status.attempts),
        "steps": max(killed),
        "lost_steps_trained_again": status.lost_steps,
        "samples": wanted.total(),
        "samples_lost": (wanted - got).total(),
        "samples_twice": (got - wanted).total(),
        "corrupt_checkpoints": len([*(run / "checkpoints").glob(".bad-*")]),
        "largest_loss_difference": max(abs(killed[step] - loss) / loss for step, loss in expected.items()),
        "goodput": round(status.goodput, 3),
    }
    return Soaked(run, facts)


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
