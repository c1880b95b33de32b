"""What an import may cost: training's libraries take seconds, and are for those who compute with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "deepspeed", "ray", "webdataset"}
DATA = ["dist_lm.data.order", "dist_lm.data.manifest", "dist_lm.data.stream"]
LAUNCHERS = ["dist_lm.local_training", "dist_lm.cluster.ray_launcher", "dist_lm.cluster.ray_train"]
"""Ranks import everything, in processes of their own."""
READERS = ["dist_lm.status", "dist_lm.summary", "dist_lm.report.page"]
"""Of a run folder."""


@pytest.mark.parametrize("module", [*DATA, *LAUNCHERS, *READERS])
def test_who_does_not_compute_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert ("numpy" in loaded) == (module in DATA)
    assert not HEAVY & set(loaded)
