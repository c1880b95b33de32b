"""Random kills for minutes, seeded: no sample is lost or seen twice, no checkpoint is corrupt.

DIST_LM_SOAK_MINUTES bounds it (`make soak MINUTES=20`, enough for all kills on two cores); the counts
are one line of JSON for each test.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from tests.faults.random_kills import kill_again_and_again
from tests.faults.test_kills import all_verify
from tests.gloo_ranks import losses, train_locally, write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(14400)]
MINUTES = float(os.environ.get("DIST_LM_SOAK_MINUTES", "5"))
SEED = int(os.environ.get("DIST_LM_SOAK_SEED", "1"))
ROWS = 32
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
GENTLE = {"optim__lr": 2e-4}
"""Sums of other numbers of ranks round otherwise, and hundreds of large steps would enlarge that beyond 1e-5."""
SAME, CHANGING = ([2], 200, 0.8), ([1, 2, 3], 50, 0.2)
"""World sizes, kills, share of the minutes."""


@pytest.mark.parametrize(("worlds", "most", "share"), [SAME, CHANGING], ids=["two ranks", "one to three"])
def test_a_run_that_is_killed_again_and_again_goes_on_as_the_calm_one(
    worlds: list[int],
    most: int,
    share: float,
    topics_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {
        **{"zero": 2, "run__save_every": 3, "batch__micro": 8, "optim__schedule": {"kind": "constant"}},
        **(DROPOUT if len(worlds) == 1 else GENTLE),
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__steps=10**6, **options)
    run, calm = tmp_path / "run", tmp_path / "calm" / "run"
    kills = kill_again_and_again(recipe, run, worlds, most=most, minutes=MINUTES * share, chance=random.Random(SEED))
    found = status_of(RunDir(run))
    soaked = losses(run)
    calm.parent.mkdir()
    calm_recipe = write_recipe(calm.parent / "recipe.yaml", topics_data, run__steps=max(soaked), **options)
    done = train_locally(calm_recipe, timeout_s=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(calm)
    seen = Counter(record["step"] for record in read_metrics(run / "metrics.jsonl", "train"))
    tokens, tokens_expected = (
        {r["step"]: r["tokens"] for r in read_metrics(one / "metrics.jsonl", "train")} for one in (run, calm)
    )
    facts = {
        "world_sizes": worlds,
        "kills": kills,
        "attempts": len(found.attempts),
        "steps": max(soaked),
        "lost_steps_trained_again": found.lost_steps,
        "samples_lost": ROWS * len(set(expected) - set(soaked)),
        "samples_twice": ROWS * sum(count - 1 for count in seen.values()),
        "corrupt_checkpoints": len([*(run / "checkpoints").glob(".bad-*")]),
        "largest_loss_difference": max(abs(soaked[step] - loss) / loss for step, loss in expected.items()),
        "goodput": round(found.goodput, 3),
    }
    with capsys.disabled():
        print(f"\n{json.dumps(facts)}")
    assert kills
    assert (facts["samples_lost"], facts["samples_twice"], facts["corrupt_checkpoints"]) == (0, 0, 0)
    assert all_verify(run)
    assert tokens == tokens_expected
    assert facts["largest_loss_difference"] <= (0.0 if len(worlds) == 1 else 1e-5)
