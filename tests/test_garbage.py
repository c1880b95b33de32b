"""The collector of cycles: seldom while libraries are imported, as usual while a model is trained."""

from __future__ import annotations

import subprocess
import sys

from tests.gloo_ranks import REPOSITORY, environment

PROGRAM = """
import gc
from dist_lm import garbage
usual = gc.get_threshold()
garbage.keep_all()
assert gc.get_freeze_count() == 0, "a program of somebody else's"
garbage.collect_seldom()
assert gc.get_threshold()[0] > 10 * usual[0]
garbage.collect_seldom()
garbage.keep_all()
assert gc.get_threshold() == usual and gc.get_freeze_count() > 1000
"""
IMPORTS = """
import gc
usual = gc.get_threshold()
import dist_lm.cluster.preload
assert gc.get_threshold() == usual and gc.get_freeze_count() > 100_000
# What is made now is still collected.
import weakref
class Ring: pass
ring = Ring(); ring.itself = ring; gone = weakref.ref(ring); del ring
gc.collect()
assert gone() is None
"""


def test_it_is_as_usual_once_everything_is_imported() -> None:
    for program in (PROGRAM, IMPORTS):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
