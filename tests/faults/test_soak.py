"""Random kills for minutes, seeded: no sample is lost or seen twice, no checkpoint is corrupt.

DIST_LM_SOAK_MINUTES bounds it (`make soak MINUTES=20`, enough for all kills on two cores); the counts
are one line of JSON for each test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.faults.random_kills import CHANGING, SAME, soaked
from tests.faults.test_kills import all_verify

pytestmark = [pytest.mark.soak, pytest.mark.timeout(14400)]
MINUTES = float(os.environ.get("DIST_LM_SOAK_MINUTES", "5"))
SEED = int(os.environ.get("DIST_LM_SOAK_SEED", "1"))


@pytest.mark.parametrize(("worlds", "most", "share"), [SAME, CHANGING], ids=["two ranks", "one to three"])
def test_a_run_that_is_killed_again_and_again_goes_on_as_the_calm_one(
    worlds: list[int],
    most: int,
    share: float,
    topics_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "soak"
    folder.mkdir()
    found = soaked(topics_data, folder, worlds, most=most, minutes=MINUTES * share, seed=SEED)
    with capsys.disabled():
        print(f"\n{json.dumps(found.facts)}")
    assert found.facts["kills"]
    assert all(found.facts[name] == 0 for name in ("samples_lost", "samples_twice", "corrupt_checkpoints"))
    assert all_verify(found.run)
    assert found.facts["largest_loss_difference"] <= (0.0 if len(worlds) == 1 else 1e-5)
