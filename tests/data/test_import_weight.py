"""What an import may cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "deepspeed", "ray", "webdataset"}


@pytest.mark.parametrize("module", ["dist_lm.data.order", "dist_lm.data.manifest", "dist_lm.data.stream"])
def test_the_data_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numpy" in loaded.split()
    assert not HEAVY & set(loaded.split())
