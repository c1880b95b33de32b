"""What a run measures, as gauges of Ray: for Prometheus and the Grafana of a cluster.

Enters: metrics.jsonl, which grows.  Leaves: gauges `ray_dist_lm_...` with the tag `run`.
Promises: it runs in the driver and reads a file: training does not wait for it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY_S = 2.0
SHOWN = {
    "train": ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds"),
    "eval": ("loss",),
}
"""Values of a record that become gauges: dist_lm_loss of `train`, dist_lm_eval_loss of `eval`."""


@contextmanager
def gauges_of(metrics: Path, run: str) -> Iterator[None]:
    """Keep the gauges of `run` at the newest record of the file while the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_feed, args=(metrics, run, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _feed(metrics: Path, run: str, ended: threading.Event) -> None:
    from ray.util.metrics import Gauge

    gauges: dict[str, Any] = {}
    position = 0
    while not ended.wait(EVERY_S):
        newest, position = read_newest(metrics, position)
        for name, value in newest.items():
            if name not in gauges:
                gauges[name] = Gauge(name, tag_keys=("run",))
            gauges[name].set(value, tags={"run": run})


def read_newest(metrics: Path, position: int) -> tuple[dict[str, float], int]:
    """The newest value of each gauge in what was written after `position`, and where that ends."""
    if not metrics.exists():
        return {}, 0
    if metrics.stat().st_size < position:
        # A new attempt has dropped the steps after its checkpoint.
        position = 0
    values: dict[str, float] = {}
    with metrics.open("rb") as file:
        file.seek(position)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        record = json.loads(line)
        prefix = "dist_lm_" if record["kind"] == "train" else f"dist_lm_{record['kind']}_"
        for name in SHOWN.get(record["kind"], ()):
            value = record.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                values[prefix + name] = float(value)
        if record["kind"] == "train":
            values["dist_lm_step"] = float(record["step"])
    return values, position + len(whole)
