"""A rank holds its share once more while it saves, and one fragment while it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20
PROGRAM = """
import sys
from pathlib import Path
import torch
from dist_lm.checkpoint.fragments import WEIGHT, Fragment
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.store import LocalStore, step_name
from tests.checkpoint.fragments_by_hand import progress, save, writer

def peak():
    # Not getrusage: its peak begins with that of the process that started this one.
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["VmHWM"].split()[0]) * 1024

store = LocalStore(Path(sys.argv[1]))
live = {name: torch.ones(4 * 2**20) for name in "abcdefgh"}
def fragments():
    for name, value in live.items():
        yield Fragment(name, (len(value),), 0, {WEIGHT: value})
if sys.argv[2] == "save":
    save(store, 1, world_size=1)
    before = peak()
    saving = writer(store)
    saving.start(progress(2), fragments)
    saving._join()
    assert saving.error is None
else:
    before = peak()
    checkpoint = Checkpoint.read(store, step_name(2))
    reader = Reader(checkpoint)
    assert not checkpoint.damage(checkpoint.files)
    for name, value in live.items():
        value.copy_(reader.read(name, WEIGHT, 0, len(value)))
print(peak() - before)
"""
SHARE, FRAGMENT, SLACK = 128 * MIB, 16 * MIB, 12 * MIB


def grown(folder: Path, mode: str) -> int:
    """Bytes by which the peak memory of a process grew; the live state is in memory before."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), mode],
        # What is freed goes back at once: the peak is that of what is held, not of the allocator's habits.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_of_a_save_and_of_a_load(tmp_path: Path) -> None:
    assert SHARE * 0.9 < grown(tmp_path, "save") <= SHARE + SLACK
    assert grown(tmp_path, "load") <= FRAGMENT + SLACK
