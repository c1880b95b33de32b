"""Which samples each step was trained on, for who wants proof.

Enters: DIST_LM_SAMPLES, a folder that all ranks reach.  Leaves: a line a step in a file for each
attempt and rank.  Promises: without the variable, nothing happens; a line is there once its step's
update is done.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from dist_lm import disk
from dist_lm.data.rows import Rows

VARIABLE = "DIST_LM_SAMPLES"


def record_samples(rows: Rows, *, attempt: int, rank: int, step: int) -> None:
    """Add this rank's samples of a step: pairs of epoch and sample id, without fillers."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    pairs = zip(rows.epoch[rows.real].tolist(), rows.sample_id[rows.real].tolist(), strict=True)
    path = Path(folder) / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl"
    with disk.disk_errors(path), path.open("a") as file:
        file.write(json.dumps({"step": step, "samples": list(pairs)}) + "\n")


def samples_by_step(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Epoch and sample id of every sample behind the weights, by step, sorted.

    Steps that a later attempt trained on anew are those of the later attempt.
    """
    steps: dict[int, list[tuple[int, int]]] = {}
    attempts = sorted({path.name.split("-")[1] for path in folder.glob("attempt-*.jsonl")})
    for attempt in attempts:
        found: dict[int, list[tuple[int, int]]] = {}
        for path in folder.glob(f"attempt-{attempt}-*.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["step"], []).extend((epoch, sample) for epoch, sample in record["samples"])
        # A file is empty where its rank was killed as it wrote the first line.
        begin = min(found, default=math.inf)
        steps = {step: samples for step, samples in steps.items() if step < begin} | found
    return {step: sorted(samples) for step, samples in sorted(steps.items())}
