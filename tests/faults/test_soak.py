"""Random kills for minutes, seeded: no sample is lost or seen twice, no checkpoint is corrupt.

DIST_LM_SOAK_MINUTES bounds it (`make soak MINUTES=10`); it tells how many kills that were.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from tests.faults.test_kills import all_verify
from tests.gloo_ranks import REPOSITORY, environment, losses, train_locally, write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(14400)]
MINUTES = float(os.environ.get("DIST_LM_SOAK_MINUTES", "5"))
SEED = int(os.environ.get("DIST_LM_SOAK_SEED", "1"))
STEPS = 400
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}


def start(recipe: Path, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", str(ranks), "--max-restarts", "0"]
    with log.open("ab") as output:
        return subprocess.Popen(words, env=environment(), cwd=REPOSITORY, stdout=output, stderr=output)


def kill_until(recipe: Path, run: Path, worlds: list[int], minutes: float, chance: random.Random) -> int:
    """Start, kill a random rank (or all) after a random number of steps, again and again; the kills."""
    kills = 0
    deadline = time.monotonic() + minutes * 60
    while time.monotonic() < deadline:
        process = start(recipe, chance.choice(worlds), run.parent / "log")
        attempt = RunDir(run).next_attempt() if run.exists() else 1
        target = chance.randrange(1, 25)
        records: list[dict[str, float]] = []
        while process.poll() is None:
            records = read_metrics(run / "metrics.jsonl", "train")
            fresh = run.exists() and RunDir(run).next_attempt() > attempt
            here = RunDir(run).attempt_facts(attempt) if fresh else {}
            if "from_step" in here and records and records[-1]["step"] >= here["from_step"] + target:
                pids = here["pids"] if chance.random() < 0.3 else [chance.choice(here["pids"])]
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
                break
            time.sleep(chance.random() * 0.1)
        process.wait(120)
        if records and records[-1]["step"] >= STEPS:
            break
    return kills


@pytest.mark.parametrize(("worlds", "tolerance"), [([2], 0.0), ([1, 2, 3], 1e-5)], ids=["two ranks", "one to three"])
def test_a_run_that_is_killed_again_and_again_ends_as_the_calm_one(
    worlds: list[int], tolerance: float, topics_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(SEED)
    options = {"zero": 2, "run__save_every": 4, "batch__micro": 8, **(DROPOUT if tolerance == 0 else {})}
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__steps=STEPS, **options)
    kills = kill_until(recipe, tmp_path / "run", worlds, MINUTES / 2, chance)
    assert kills
    found = status_of(RunDir(tmp_path / "run"))
    reached = max(losses(tmp_path / "run"), default=0)
    done = train_locally(recipe, timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all_verify(tmp_path / "run")
    (tmp_path / "calm").mkdir()
    calm_recipe = write_recipe(tmp_path / "calm" / "recipe.yaml", topics_data, run__steps=STEPS, **options)
    calm = train_locally(calm_recipe, timeout_s=600)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    soaked, expected = losses(tmp_path / "run"), losses(tmp_path / "calm" / "run")
    assert sorted(soaked) == list(range(1, STEPS + 1))
    if tolerance:
        assert [*soaked.values()] == pytest.approx([*expected.values()], rel=tolerance)
    else:
        assert soaked == expected
    with capsys.disabled():
        print(f"\n{kills} kills, {reached} steps, lost steps {found.lost_steps}, goodput {found.goodput:.1%}")
    shutil.rmtree(tmp_path / "run")
